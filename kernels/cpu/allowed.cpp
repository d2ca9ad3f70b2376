#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "export.h"

// Whether the system lets this process use the processor as it was compiled for: 1, or 0. Linux is asked for AMX, whose
// registers make a thread's state ten times as large.
EXPORT int eft_allowed() {
#if defined(__AMX_INT8__)
    constexpr long ASK = 0x1023, SQUARES = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, ASK, SQUARES) == 0;
#else
    return 1;
#endif
}

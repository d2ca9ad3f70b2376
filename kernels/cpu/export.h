// What Python calls: C names, the only ones that the library shows.
#pragma once

#define EXPORT extern "C" __attribute__((visibility("default")))

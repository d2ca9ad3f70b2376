# shellcheck shell=bash
# Sourced by the other scripts: where they run, and how they speak.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
VENV=${VENV:-.venv}

say() { echo "eft: $*" >&2; }
die() {
    say "$*"
    exit 1
}
run() {
    echo "+ $*" >&2
    "$@"
}
is_root() { [ "$(id -u)" = 0 ]; }
has() { command -v "$1" >/dev/null 2>&1; }

# apt_get ARGUMENTS...: as root, with the package lists read once, and never asking anything.
apt_get() {
    export DEBIAN_FRONTEND=noninteractive
    if [ -z "${APT_UPDATED:-}" ]; then
        run apt-get update -q
        APT_UPDATED=1
    fi
    run apt-get -o DPkg::Lock::Timeout=600 "$@"
}

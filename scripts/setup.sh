#!/usr/bin/env bash
# Makes .venv with everything this project runs on: the pinned versions of constraints.txt and the project itself.
# `make setup` calls it. It may be run again, by several at once, and after a kill; with nothing to do it takes
# a fraction of a second.
#
# PYTHON  the interpreter to use (default: the first of python3, python3.12, python3.11 that is 3.11 or 3.12)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv log=build/setup.log shim=scripts/opencv-small
readonly stamp=$venv/.setup-done unfinished=$venv/.setup-unfinished
unset PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX
export PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

die() { # SENTENCE: a failure that was noticed leaves a .venv that the next call can go on with
    rm -f "$unfinished"
    printf 'error: %s\n' "$1" >&2
    exit 2
}

stage() { # NAME COMMAND...: one line on the terminal, the rest in the log, whose end is shown on failure
    printf 'setup: %s ... ' "$1"
    local start=$SECONDS
    if ! "${@:2}" >>"$log" 2>&1 </dev/null; then
        printf 'failed\n'
        tail -n 30 "$log" >&2
        die "set-up failed at '$1'; the whole log is $log."
    fi
    printf '%d s\n' $((SECONDS - start))
}

# --- which Python ---------------------------------------------------------------------------------------------

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; }

minor_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

choose_python() { # prints the interpreter
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON is not a program."
        supported "$PYTHON" || die "Python 3.11 or 3.12 is needed, but PYTHON=$PYTHON is $("$PYTHON" -V 2>&1)."
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null && supported "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    die "Python 3.11 or 3.12 is needed and none was found: install one, or name it with PYTHON=/path/to/python3.12."
}

usable_venv() { # an environment that was not cut off while it was made, of a supported Python and the asked one
    [[ ! -e $unfinished && -x $venv/bin/python ]] && supported "$venv/bin/python" &&
        "$venv/bin/python" -m pip --version >/dev/null 2>&1 &&
        [[ -z ${PYTHON:-} || $(minor_version "$venv/bin/python") == $(minor_version "$PYTHON") ]]
}

fingerprint() { # what the set-up depends on; the folder too, as the project is installed in place
    { cat constraints.txt pyproject.toml scripts/setup.sh "$shim"/*.pc "$shim"/*/*.hpp && pwd &&
        "$venv/bin/python" -V; } 2>/dev/null | sha256sum
}

up_to_date() {
    [[ -f $stamp && ! -e $unfinished && $(<"$stamp") == "$(fingerprint)" ]] &&
        [[ -z ${PYTHON:-} || $(minor_version "$venv/bin/python") == $(minor_version "$PYTHON") ]]
}

# --- what the system must have --------------------------------------------------------------------------------

has_stock_opencv() { pkg-config --exists opencv4 2>/dev/null; }
has_small_opencv() { [[ -f /usr/include/opencv4/opencv2/core.hpp && -f /usr/include/opencv4/opencv2/imgproc.hpp ]]; }
has_turbojpeg() { pkg-config --exists libturbojpeg 2>/dev/null; }
has_python_headers() {
    [[ -f $("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]]
}

missing_packages() { # prints the Debian packages that stand for what is missing
    local debian_python
    debian_python=python$(minor_version "$python")
    [[ $has_venv ]] || "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "$debian_python-venv"
    if [[ $has_ffcv ]]; then
        return # built before: nothing is compiled again
    fi
    has_python_headers || echo "$debian_python-dev"
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    has_stock_opencv || has_small_opencv || echo libopencv-imgproc-dev
    has_turbojpeg || echo libturbojpeg0-dev
}

apt_install() { # PACKAGE...
    local as_root=()
    [[ $(id -u) == 0 ]] || as_root=(sudo -n)
    # An update may fail for a source that has nothing to do with us: the install decides.
    "${as_root[@]}" apt-get update || true
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 \
        install -y --no-install-recommends "$@"
}

install_system_packages() {
    local missing
    read -r -d '' -a missing < <(missing_packages) || true
    ((${#missing[@]})) || return 0
    local names="${missing[*]}"
    if ! command -v apt-get >/dev/null; then
        die "what Debian calls $names is missing: install it with this system's package manager, then run make again."
    elif [[ $(id -u) != 0 ]] && ! sudo -n true 2>/dev/null; then
        die "run 'sudo apt-get install --no-install-recommends $names' (root is needed for it), then run make again."
    fi
    stage "system packages $names" apt_install "${missing[@]}"
}

has_browser() { # one that tests/browser.py looks for
    local name
    for name in chromium-headless-shell chromium chromium-browser google-chrome google-chrome-stable; do
        if command -v "$name" >/dev/null; then return; fi
    done
    return 1
}

install_browser() { # the tests that open a report's page are skipped without one, so a failure here ends nothing
    if has_browser || ! command -v apt-get >/dev/null || { [[ $(id -u) != 0 ]] && ! sudo -n true 2>/dev/null; }; then
        return 0
    fi
    printf 'setup: a browser for the tests ... '
    local start=$SECONDS
    if apt_install chromium-headless-shell >>"$log" 2>&1 </dev/null; then
        printf '%d s\n' $((SECONDS - start))
    else
        printf 'none to be had: the tests that need one will be skipped\n'
    fi
}

# --- the environment ------------------------------------------------------------------------------------------

make_venv() { # the mark comes first and goes last, so that a kill in between is seen by the next call
    rm -rf "$venv" && mkdir "$venv" && touch "$unfinished" && "$python" -m venv "$venv"
}

pip_install() { "$venv/bin/python" -m pip install --constraint constraints.txt "$@"; }

pinned() { sed -n "s/^$1==//p" constraints.txt; } # PACKAGE: prints its version here

installed() { # PACKAGE: prints its version in the environment
    "$venv/bin/python" -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' "$1"
}

build_ffcv() { # no cached wheel: it may be linked to libraries that this machine no longer has
    local folder status=0
    folder=$(mktemp -d) || return # FFCV splits pkg-config's answer at blanks, and this path has none
    cp -r "$shim/." "$folder" || status=1
    has_stock_opencv || export PKG_CONFIG_PATH="$folder${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"
    pip_install --no-deps --no-build-isolation --no-cache-dir --force-reinstall --no-binary ffcv ffcv || status=1
    rm -rf "$folder"
    return "$status"
}

check_environment() { # imports what was installed, and looks that nothing replaced torch
    local found
    found=$(installed torch) || return
    echo "torch $found is installed, $(pinned torch) is pinned"
    [[ ${found%%+*} == "$(pinned torch)" ]] || return
    "$venv/bin/python" -c 'import torch, numba, cv2, ffcv, ffcv.fields, fastargs, sklearn, matplotlib, optuna, rlp'
}

ffcv_is_ready() { # the pinned version is there and loads: the libraries that it was compiled against still exist
    [[ $(installed ffcv) == "$(pinned ffcv)" ]] && "$venv/bin/python" -c 'import ffcv'
} 2>/dev/null

install_everything() {
    [[ $has_venv ]] || stage "a fresh $venv ($("$python" -V))" make_venv
    # Torch goes in alone and first: later packages then find it and have no reason to bring another build.
    stage "torch $(pinned torch)" pip_install torch
    stage "build tools" pip_install setuptools wheel
    stage "the pinned packages and this project" pip_install --no-build-isolation --editable '.[train,dev]'
    [[ $has_ffcv ]] || stage "FFCV, compiled here" build_ffcv
    stage "check" check_environment
}

up_to_date && exit 0
mkdir -p build
exec 9>build/.setup.lock
flock -n 9 || { printf 'setup: waiting for another set-up in this folder\n' && flock 9; }
up_to_date && exit 0

: >"$log"
has_venv='' has_ffcv=''
if usable_venv; then
    has_venv=yes python=$venv/bin/python
    if ffcv_is_ready; then has_ffcv=yes; fi
else
    python=$(choose_python)
fi
install_system_packages
install_everything
install_browser
rm -f "$unfinished"
fingerprint >"$stamp"
printf 'setup: done in %d s\n' "$SECONDS"

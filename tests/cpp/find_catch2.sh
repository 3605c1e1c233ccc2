#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Catch2 from the system where it is installed, else from the system's packages where that is possible. Otherwise
# CMake fetches it; when that fails too, the C++ tests are named as not run.
for dir in /usr/include /usr/local/include; do
  if [ -e "$dir/catch2/catch.hpp" ] || [ -e "$dir/catch2/catch_all.hpp" ]; then exit 0; fi
done
if command -v cmake >/dev/null &&
  cmake --find-package -DNAME=Catch2 -DCOMPILER_ID=GNU -DLANGUAGE=CXX -DMODE=EXIST >/dev/null 2>&1; then
  exit 0
fi
command -v apt-get >/dev/null || exit 0
if [ "$(id -u)" = 0 ]; then
  run=""
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
  run="sudo -n"
else
  exit 0
fi
echo "installing catch2 from the system's packages"
$run apt-get install -y -qq catch2 >/dev/null 2>&1 ||
  { $run apt-get update -qq >/dev/null 2>&1 && $run apt-get install -y -qq catch2 >/dev/null 2>&1; } ||
  echo "catch2 could not be installed; CMake will try to fetch it"
exit 0

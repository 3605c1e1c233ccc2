// SPDX-License-Identifier: Apache-2.0
// The slow headers of the op floor's tests, parsed once.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include "support/catch.hpp"

// SPDX-License-Identifier: Apache-2.0
// The slow headers, parsed once for all operator files.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

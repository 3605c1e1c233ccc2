// SPDX-License-Identifier: Apache-2.0
// Per-device state of the kernel floor.
#include "kernels/runtime.h"

#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "kernels/common/launch.cuh"

namespace uncomp::kernels {
namespace {

constexpr int kMaxDevices = 64;

std::mutex& lock() {
  static std::mutex m;
  return m;
}

cudaError_t current(int* device) {
  const cudaError_t err = cudaGetDevice(device);
  if (err != cudaSuccess) return err;
  return *device < kMaxDevices ? cudaSuccess : cudaErrorInvalidDevice;
}

}  // namespace

cudaError_t device_info(DeviceInfo* info) {
  static DeviceInfo known[kMaxDevices] = {};
  int device = 0;
  if (const cudaError_t err = current(&device); err != cudaSuccess) return err;
  const std::lock_guard<std::mutex> hold(lock());
  DeviceInfo& entry = known[device];
  if (entry.sm_count == 0) {
    int sms = 0, major = 0, minor = 0, l2 = 0, smem = 0;
    const std::pair<int*, cudaDeviceAttr> wanted[] = {{&major, cudaDevAttrComputeCapabilityMajor},
                                                      {&minor, cudaDevAttrComputeCapabilityMinor},
                                                      {&l2, cudaDevAttrL2CacheSize},
                                                      {&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                                                      {&sms, cudaDevAttrMultiProcessorCount}};
    for (const auto& [value, attribute] : wanted) {
      if (const cudaError_t err = cudaDeviceGetAttribute(value, attribute, device); err != cudaSuccess) return err;
    }
    entry = DeviceInfo{sms, major * 10 + minor, l2, smem};
  }
  *info = entry;
  return cudaSuccess;
}

cudaError_t allow_shared_memory(const void* kernel, size_t bytes) {
  // 48 KiB need no permission, but the kernel's static shared memory counts too.
  if (bytes <= 16 * 1024) return cudaSuccess;
  static std::map<std::pair<const void*, int>, size_t> granted;
  int device = 0;
  if (const cudaError_t err = current(&device); err != cudaSuccess) return err;
  const std::lock_guard<std::mutex> hold(lock());
  size_t& have = granted[{kernel, device}];
  if (have >= bytes) return cudaSuccess;
  const cudaError_t err =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (err == cudaSuccess) have = bytes;
  return err;
}

cudaError_t active_clusters(const void* kernel, int32_t blocks, int32_t threads, size_t shared_bytes, int32_t* count) {
  static std::map<std::tuple<const void*, int, int32_t, int32_t, size_t>, int32_t> known;
  int device = 0;
  if (const cudaError_t err = current(&device); err != cudaSuccess) return err;
  const std::lock_guard<std::mutex> hold(lock());
  const auto [entry, fresh] = known.try_emplace({kernel, device, blocks, threads, shared_bytes}, 0);
  if (fresh) {
    cudaFuncAttributes attributes{};
    if (const cudaError_t err = cudaFuncGetAttributes(&attributes, kernel); err != cudaSuccess) return err;
    // Code for sm_80, also when it is compiled from PTX for a newer device, knows no clusters.
    if (attributes.ptxVersion >= 90) {
      constexpr int32_t kPortable = 8;
      if (blocks > kPortable) {
        (void)cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      }
      cudaLaunchAttribute cluster = cluster_attribute(blocks);
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(static_cast<unsigned>(blocks));
      config.blockDim = dim3(static_cast<unsigned>(threads));
      config.dynamicSmemBytes = shared_bytes;
      config.attrs = &cluster;
      config.numAttrs = 1;
      int clusters = 0;
      // A refusal means "does not fit"; it must not stay behind as the last error.
      if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
        (void)cudaGetLastError();
        clusters = 0;
      }
      entry->second = clusters;
    }
  }
  *count = entry->second;
  return cudaSuccess;
}

cudaError_t cluster_fits(const void* kernel, int32_t blocks, int32_t threads, size_t shared_bytes, bool* fits) {
  int32_t count = 0;
  const cudaError_t err = active_clusters(kernel, blocks, threads, shared_bytes, &count);
  *fits = count > 0;
  return err;
}

cudaError_t compiled_for_sm_90(const void* kernel, bool* yes) {
  static std::map<std::pair<const void*, int>, bool> known;
  int device = 0;
  if (const cudaError_t err = current(&device); err != cudaSuccess) return err;
  const std::lock_guard<std::mutex> hold(lock());
  const auto [entry, fresh] = known.try_emplace({kernel, device}, false);
  if (fresh) {
    cudaFuncAttributes attributes{};
    if (const cudaError_t err = cudaFuncGetAttributes(&attributes, kernel); err != cudaSuccess) return err;
    entry->second = attributes.ptxVersion >= 90;
  }
  *yes = entry->second;
  return cudaSuccess;
}

cudaError_t allow_large_clusters(const void* kernel) {
  static std::map<std::pair<const void*, int>, bool> allowed;
  bool sm_90 = false;
  if (const cudaError_t err = compiled_for_sm_90(kernel, &sm_90); err != cudaSuccess || !sm_90) return err;
  int device = 0;
  if (const cudaError_t err = current(&device); err != cudaSuccess) return err;
  const std::lock_guard<std::mutex> hold(lock());
  bool& done = allowed[{kernel, device}];
  if (done) return cudaSuccess;
  const cudaError_t err = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  done = err == cudaSuccess;
  return err;
}

cudaError_t error_word(int32_t** word) {
  static int32_t* words[kMaxDevices] = {};
  int device = 0;
  if (const cudaError_t err = current(&device); err != cudaSuccess) return err;
  const std::lock_guard<std::mutex> hold(lock());
  if (words[device] == nullptr) {
    int32_t* fresh = nullptr;
    if (const cudaError_t err = cudaMalloc(&fresh, sizeof(int32_t)); err != cudaSuccess) return err;
    if (const cudaError_t err = cudaMemset(fresh, 0, sizeof(int32_t)); err != cudaSuccess) return err;
    words[device] = fresh;
  }
  *word = words[device];
  return cudaSuccess;
}

cudaError_t take_error(int32_t* code) {
  int32_t* word = nullptr;
  if (const cudaError_t err = error_word(&word); err != cudaSuccess) return err;
  if (const cudaError_t err = cudaDeviceSynchronize(); err != cudaSuccess) return err;
  if (const cudaError_t err = cudaMemcpy(code, word, sizeof(int32_t), cudaMemcpyDeviceToHost); err != cudaSuccess) {
    return err;
  }
  return *code == 0 ? cudaSuccess : cudaMemset(word, 0, sizeof(int32_t));
}

cudaError_t warmup() {
  int32_t* word = nullptr;
  DeviceInfo info;
  if (const cudaError_t err = error_word(&word); err != cudaSuccess) return err;
  return device_info(&info);
}

}  // namespace uncomp::kernels

// SPDX-License-Identifier: Apache-2.0
// Device memory for the tests of the kernel floor, with guard bands that show every write outside a buffer.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace uncomp::test {

inline void cuda_ok(cudaError_t err) {
  if (err != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(err));
}

/// Bytes without a short period, so that a misplaced one shows.
inline std::vector<char> numbered_bytes(size_t count, uint32_t seed = 0) {
  std::vector<char> bytes(count);
  for (size_t i = 0; i < count; ++i) bytes[i] = static_cast<char>((i + seed) * 2654435761u >> 13);
  return bytes;
}

/// `count` elements on the device between two guard bands of poison.
template <class T>
class DeviceArray {
 public:
  static constexpr size_t kGuard = 256;  // bytes
  static constexpr unsigned char kPoison = 0xA5;

  explicit DeviceArray(size_t count) : count_(count) {
    cuda_ok(cudaMalloc(reinterpret_cast<void**>(&base_), bytes() + 2 * kGuard));
    cuda_ok(cudaMemset(base_, kPoison, bytes() + 2 * kGuard));
    cuda_ok(cudaDeviceSynchronize());  // a stream that waits for no other may write first thing
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    if (count_ > 0) cuda_ok(cudaMemcpy(data(), host.data(), bytes(), cudaMemcpyHostToDevice));
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(base_); }

  T* data() { return reinterpret_cast<T*>(base_ + kGuard); }
  const T* data() const { return reinterpret_cast<const T*>(base_ + kGuard); }
  size_t size() const { return count_; }

  /// Waits for the device and copies the contents back.
  std::vector<T> host() const {
    cuda_ok(cudaDeviceSynchronize());
    std::vector<T> copy(count_);
    if (count_ > 0) cuda_ok(cudaMemcpy(copy.data(), data(), bytes(), cudaMemcpyDeviceToHost));
    return copy;
  }

  void fill(unsigned char byte) { cuda_ok(cudaMemset(data(), byte, bytes())); }
  void assign(const std::vector<T>& host) {
    if (host.size() != count_) throw std::logic_error("other contents must be as many");
    cuda_ok(cudaMemcpy(data(), host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }

  /// True while nothing wrote before or behind the buffer.
  bool guards_intact() const {
    cuda_ok(cudaDeviceSynchronize());
    std::vector<unsigned char> all(bytes() + 2 * kGuard);
    cuda_ok(cudaMemcpy(all.data(), base_, all.size(), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < kGuard; ++i) {
      if (all[i] != kPoison || all[all.size() - 1 - i] != kPoison) return false;
    }
    return true;
  }

 private:
  size_t bytes() const { return count_ * sizeof(T); }
  size_t count_;
  unsigned char* base_ = nullptr;
};

}  // namespace uncomp::test

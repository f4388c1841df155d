// Memory that a thread keeps from call to call: fresh memory costs page faults.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace nanogpt {

template <typename T>
class Buffer {
 public:
  // Room for `count` elements that starts with a line of cache; what was there may be lost.
  T* room(int64_t count) {
    if (count > count_) {
      const size_t bytes = (count * sizeof(T) + kLine - 1) / kLine * kLine;
      data_.reset(static_cast<T*>(std::aligned_alloc(kLine, bytes)));
      if (!data_) throw std::bad_alloc();
      count_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  static constexpr size_t kLine = 64;
  std::unique_ptr<T, Free> data_;
  int64_t count_ = 0;
};

}  // namespace nanogpt

// The device query answers on every machine: with devices, or with words.

#include <cstring>

#include "cuda/device.h"
#include "tests/check.h"

int main() {
  int count = -1;
  const char* error = kdk::cuda_device_count(&count);
  if (error != nullptr) {
    std::printf("no CUDA device here: %s\n", error);
    CHECK(std::strlen(error) > 0);
    CHECK(count == 0);
  } else {
    CHECK(count > 0);
  }

  for (int index = 0; index < count; ++index) {
    kdk::CudaDevice device;
    CHECK(kdk::cuda_device(index, &device) == nullptr);
    CHECK(std::strlen(device.name) > 0);
    CHECK(device.compute_major >= 7);
    CHECK(device.multiprocessors > 0);
    CHECK(device.memory_bytes > 0);
    CHECK(device.l2_bytes > 0);
    CHECK(device.shared_bytes_per_block >= 48 * 1024);
    CHECK(device.clusters == (device.compute_major >= 9));
  }

  // A device that is not there is words as well, and the words do not stick.
  kdk::CudaDevice device;
  CHECK(kdk::cuda_device(count, &device) != nullptr);
  const char* again = kdk::cuda_device_count(&count);
  CHECK((again == nullptr) == (error == nullptr));
  return kdk::test::checks_failed();
}

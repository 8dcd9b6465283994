#include "cpu/threads.h"

#include <dlfcn.h>

namespace kdk {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// What `#pragma omp parallel` calls, in GNU's library and, for its sake, in LLVM's and Intel's. It
// is looked up instead of linked: a wheel may not count on a library outside it, and a copy in it
// would start threads of its own beside torch's and not know of torch.set_num_threads.
Parallel find_parallel() {
  void* found = dlsym(RTLD_DEFAULT, "GOMP_parallel");  // of the library that torch has loaded
  if (found == nullptr) {
    if (void* library = dlopen("libgomp.so.1", RTLD_LAZY)) found = dlsym(library, "GOMP_parallel");
  }
  return reinterpret_cast<Parallel>(found);
}

Parallel parallel() {
  static const Parallel found = find_parallel();
  return found;
}

}  // namespace

void run_in_threads(int threads, void (*task)(void*), void* context) {
  if (parallel() != nullptr) {
    parallel()(task, context, static_cast<unsigned>(threads), 0);
  } else {
    task(context);
  }
}

bool has_threads() { return parallel() != nullptr; }

}  // namespace kdk

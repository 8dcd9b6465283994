// The threads of the CPU's row operators: those that torch computes with.
#pragma once

namespace kdk {

// task(context) in up to `threads` threads at once, this one among them; returns when all have. In
// this thread alone where the process has no OpenMP library.
void run_in_threads(int threads, void (*task)(void*), void* context);

// Whether it has one.
bool has_threads();

}  // namespace kdk

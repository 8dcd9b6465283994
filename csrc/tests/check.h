// All the test framework the C++ tests need. A test is a main() that makes CHECKs and returns
// checks_failed().
#pragma once

#include <cstdio>

namespace kdk::test {

inline int checks = 0;
inline int failures = 0;

inline void check(bool ok, const char* expression, const char* file, int line) {
  ++checks;
  if (ok) return;
  ++failures;
  std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, expression);
}

// The exit status of a test. A test that checked nothing has failed.
inline int checks_failed() {
  std::printf("%d checks, %d failed\n", checks, failures);
  return checks == 0 || failures != 0;
}

}  // namespace kdk::test

#define CHECK(...) \
  ::kdk::test::check(static_cast<bool>(__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)

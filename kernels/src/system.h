// Functions that operating systems provide under different names.
#pragma once

#include <atomic>

namespace edgelm {

// Sleep while `number` is `seen`; may return before it changes. A thread that changes the number calls wake_all
// afterwards.
//
// Both use the system's own way to wait for an address. A mutex and a condition variable would stay held by threads
// that a forked process does not have.
void sleep_while(const std::atomic<int>& number, int seen);
void wake_all(std::atomic<int>& number);

// Keep this library in the process until the process ends, even if somebody closes it. Throws std::runtime_error.
void stay_loaded();

}  // namespace edgelm

// What operating systems have by different names.
#pragma once

#include <atomic>

namespace edgelm {

// Sleep while a number is what it is; may return before it changes. Whoever changes it calls wake_all behind that.
//
// By the system's own means to wait for an address: a mutex and a condition variable would be kept by threads that a
// forked process does not have.
void sleep_while(const std::atomic<int>& number, int seen);
void wake_all(std::atomic<int>& number);

// Keep this library in the process until its end, whoever closes it. Throws std::runtime_error.
void stay_loaded();

}  // namespace edgelm

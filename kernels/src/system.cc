#include "system.h"

#include <stdexcept>

#if defined(_WIN32)
#include <windows.h>
// Needs windows.h.
#include <synchapi.h>
#else
#include <dlfcn.h>
#endif

namespace edgelm {

namespace {
constexpr const char* kRefused = "the system does not keep edgelm-kernels loaded";
}

#if defined(_WIN32)

// On Windows, libc++'s own way to wait is polling.
void sleep_while(const std::atomic<int>& number, int seen) {
  static_assert(sizeof number == sizeof seen);
  WaitOnAddress(const_cast<std::atomic<int>*>(&number), &seen, sizeof seen, INFINITE);
}

void wake_all(std::atomic<int>& number) { WakeByAddressAll(&number); }

void stay_loaded() {
  HMODULE self = nullptr;
  if (!GetModuleHandleExW(GET_MODULE_HANDLE_EX_FLAG_PIN | GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS,
                          reinterpret_cast<LPCWSTR>(&stay_loaded), &self))
    throw std::runtime_error(kRefused);
}

#else

void sleep_while(const std::atomic<int>& number, int seen) { number.wait(seen); }

void wake_all(std::atomic<int>& number) { number.notify_all(); }

void stay_loaded() {
  Dl_info self{};
  if (dladdr(reinterpret_cast<void*>(&stay_loaded), &self) == 0 ||
      dlopen(self.dli_fname, RTLD_NOW | RTLD_NODELETE) == nullptr)
    throw std::runtime_error(kRefused);
}

#endif

}  // namespace edgelm

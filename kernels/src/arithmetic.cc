// Which implementation a processor gets.

#include "arithmetic.h"

#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace edgelm {

namespace {

// To test, on one processor, what others compute: the name of an implementation that it has too.
constexpr const char* kChoice = "EDGELM_KERNELS_ARITHMETIC";

// The implementations that run here, the fastest first.
std::vector<const Arithmetic*> here() {
  std::vector<const Arithmetic*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool avx_vnni = avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
  if (avx2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back(&kAvx512);
  if (avx_vnni) found.push_back(&kAvxVnni);
  if (avx2) found.push_back(&kAvx2);
#elif defined(__aarch64__)
#if defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP)
#endif
    found.push_back(&kNeonDot);  // all of Apple's processors have it
  found.push_back(&kNeon);
#endif
  return found;
}

const Arithmetic* choose() {
  const char* const name = std::getenv(kChoice);
  for (const Arithmetic* candidate : here())
    if (name == nullptr || std::strcmp(name, candidate->name) == 0) return candidate;
  return nullptr;
}

}  // namespace

const Arithmetic* arithmetic() {
  static const Arithmetic* const chosen = choose();
  return chosen;
}

}  // namespace edgelm

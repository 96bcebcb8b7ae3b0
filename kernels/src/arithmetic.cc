// Which implementation a processor gets.

#include "arithmetic.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace edgelm {

namespace {

#if defined(__x86_64__)
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
}

const Arithmetic* choose() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return &kAvx512;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return nullptr;
  return has_avx_vnni() ? &kAvxVnni : &kAvx2;
}
#elif defined(__aarch64__)
const Arithmetic* choose() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? &kNeonDot : &kNeon;
#else
  return &kNeonDot;  // Apple's processors all have it
#endif
}
#else
const Arithmetic* choose() { return nullptr; }
#endif

}  // namespace

const Arithmetic* arithmetic() {
  static const Arithmetic* const chosen = choose();
  return chosen;
}

}  // namespace edgelm

// Which implementation a processor gets.

#include "arithmetic.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace edgelm {

namespace {

// For tests on one processor of what others compute: the name of an implementation that this processor also has.
constexpr const char* kChoice = "EDGELM_KERNELS_ARITHMETIC";

#if defined(__x86_64__)
// What the cpuid instruction reports; zeros for leaves that the processor does not have. Not __builtin_cpu_supports: it
// needs a library, which not every compiler comes with.
struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Leaf cpuid(unsigned leaf, unsigned subleaf) {
  Leaf found;
  __get_cpuid_count(leaf, subleaf, &found.a, &found.b, &found.c, &found.d);
  return found;
}

// XCR0: a bit for each kind of register that the system saves when it switches threads.
unsigned saved_registers() {
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool all(unsigned word, std::initializer_list<int> bits) {
  for (int bit : bits)
    if ((word >> bit & 1) == 0) return false;
  return true;
}
#endif

// The implementations that run here, the fastest first.
std::vector<const Arithmetic*> here() {
  std::vector<const Arithmetic*> found;
#if defined(__x86_64__)
  const Leaf basic = cpuid(1, 0), more = cpuid(7, 0);
  const unsigned saved = all(basic.c, {27}) ? saved_registers() : 0;
  const bool avx2 = all(saved, {1, 2}) && all(basic.c, {12}) && all(more.b, {5});  // with FMA
  if (avx2 && all(saved, {5, 6, 7}) && all(more.b, {16, 17, 30, 31}) && all(more.c, {11})) found.push_back(&kAvx512);
  if (avx2 && all(cpuid(7, 1).a, {4})) found.push_back(&kAvxVnni);
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

#include "lanes_avx2.h"
// The lanes come first.
#include "arithmetic_impl.h"

namespace edgelm {
extern const Arithmetic kAvx2 = implementation("avx2");
}

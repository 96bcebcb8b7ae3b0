#include "lanes_avx512.h"
// The lanes come first.
#include "arithmetic_impl.h"

namespace edgelm {
extern const Arithmetic kAvx512 = implementation("avx512_vnni");
}

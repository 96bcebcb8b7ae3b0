#include "lanes_neon.h"
// The lanes come first.
#include "arithmetic_impl.h"

namespace edgelm {
extern const Arithmetic kNeonDot = implementation("asimddp");
}

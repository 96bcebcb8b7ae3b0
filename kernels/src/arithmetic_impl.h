// Implements `Arithmetic` with the lanes and bytes of the header that is included before this one.
#pragma once

#include "attention_impl.h"
#include "nibbles_impl.h"
#include "panels_impl.h"
#include "products_impl.h"

namespace edgelm {
namespace {

constexpr Arithmetic implementation(const char* name) {
  return {name,         kOffset,     kPanelRows,   quantize,        largest_magnitude,
          norm,         plain_norm,  gate,         tanh_gelu_gate,  gelu_gate,
          columns,      rows,        pack_columns, pack_rows,       panel,
          scale,        scale_parts, rotate,       to_int8,         to_scaled_int8,
          to_int16,     key_pairs,   value_pairs,  float_key_pairs, float_value_pairs,
          pairs,        scores,      weights,      scaled_weights,  merge,
          merge_values, divide,      nibbles,      pack_nibbles};
}

}  // namespace
}  // namespace edgelm

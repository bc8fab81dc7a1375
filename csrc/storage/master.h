// What is kept beside a 16-bit parameter so that no update is lost to its rounding, and how the two are joined.
//
// A float32 copy: taken as it is, or made anew where something else has changed the parameter. The low 16 bits: with
// the parameter's they are the float32, bit for bit, because the parameter is rounded half up on its bit pattern, so
// that it is the high half plus the top one of the low bits; to nearest even would not tell 0x8000 above from 0x8000
// below. A compensation in the parameter's dtype: what rounding took off, given back at the next step (Kahan 1965).
#pragma once

#include "storage/storage.h"

namespace fusedopt {

// A float of a parameter's storage, as a float.
template <class U, class X>
FUSEDOPT_FN X rounded_to_16(int storage, X x) {
  return float_from_16<X>(storage, float_to_16<U>(storage, x));
}

// The parameter that the rule sees, from p as stored and from what is kept. Low bits arrive sign-extended, as a float's
// bits. They cannot be those of this p where they make a NaN of it: something has set it to 0 or to infinity.
template <class U, class X>
FUSEDOPT_FN X exact_param(int param_storage, int storage, X p, X kept) {
  if (storage == kLowBits) {
    const X joined = bit_cast<X>(bit_cast<U>(p) + bit_cast<U>(kept));
    return joined != joined ? p : joined;
  }
  if (storage == kFloat32) return rounded_to_16<U>(param_storage, kept) == p ? kept : p;
  return p + kept;
}

// What is kept of an exact parameter, which becomes what its storage rounds to the stored one.
template <class U, class X>
FUSEDOPT_FN X split_param(int param_storage, int storage, X& p) {
  const X exact = p;
  if (storage == kFloat32) return exact;
  const X nothing = X{};
  if (storage == kLowBits) {
    const U bits = bit_cast<U>(exact);
    const X high = bit_cast<X>((bits + 0x8000u) & 0xFFFF0000u);
    p = exact != exact ? exact : high;
    return exact != exact ? nothing : bit_cast<X>(bits);
  }
  const X lost = exact - rounded_to_16<U>(param_storage, exact);
  return lost - lost == nothing ? lost : nothing;  // of infinity nothing is lost
}

}  // namespace fusedopt

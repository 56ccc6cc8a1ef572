// The lower tail of the normal distribution, for GELU on CPUs and GPUs.
//
// Phi(-a) = exp(-a^2 / 2) R(a) for a = |x|, so that the tail does not cancel. R falls slowly, from 1/2 towards
// 1 / (a sqrt(2 pi)), and is smooth in v = a / (a + 3). The polynomial is its minimax fit in v (Remez exchange in 40
// digits; relative error 9e-9) for a up to 14.5, where the exponential underflows. In float32 Phi comes to about 1e-7
// for a below 3 and 2e-6 in the far tail.
#pragma once

// R(v) by Horner's rule: the first coefficient, then r = r v + c with each of the others.
#define GPTCORE_TAIL_FIRST 2.72342142e-2f
#define GPTCORE_TAIL(NEXT)                                                      \
  NEXT(-9.31109186e-2f) NEXT(8.39373651e-2f) NEXT(9.10632874e-3f)               \
  NEXT(6.22576922e-2f) NEXT(-1.58782357e-1f) NEXT(-2.86965246e-1f)              \
  NEXT(1.05315478f) NEXT(-1.19682654f) NEXT(0.5f)

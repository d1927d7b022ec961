// The coefficients (a, b, c) of x -> a x + b x^3 + c x^5, step by step, for C and CUDA; a test compares reference.py.
// [0] Polar Express (Amsel et al. 2025, degree 5, made for singular values in [1e-3, 1] with a margin of 2 %)
// [1] Newton-Schulz (Jordan et al. 2024)
#pragma once
#define STEPS 5
#define NEWTON_SCHULZ_STEP {3.4445f, -4.7750f, 2.0315f}
#define POLYNOMIALS                                                  \
  {{{8.156554524902461f, -22.48329292557795f, 15.878769915207462f},  \
    {4.042929935166739f, -2.808917465908714f, 0.5000178451051316f},  \
    {3.8916678022926607f, -2.772484153217685f, 0.5060648178503393f}, \
    {3.285753657755655f, -2.3681294933425376f, 0.46449024233003106f}, \
    {2.3465413258596377f, -1.7097828382687081f, 0.42323551169305323f}}, \
   {NEWTON_SCHULZ_STEP, NEWTON_SCHULZ_STEP, NEWTON_SCHULZ_STEP, NEWTON_SCHULZ_STEP, NEWTON_SCHULZ_STEP}}
#define MARGINS {1.02f, 1.0f}  // of a matrix's norm, before the first step
#define NORM_EPS {1e-6f, 1e-7f}  // added to that norm
#define TINY 1e-10f  // a mean square or norm below it counts as it
#define TINY_ROW 1e-7f  // a row with a smaller norm is scaled as if it had this one

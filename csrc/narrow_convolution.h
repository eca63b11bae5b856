// The convolution of few channels read, which convolution_cpu.cpp leaves to narrow_convolution_cpu.cpp.
#pragma once

#include "convolution.h"

namespace semiseg::SEMISEG_LEVEL {

void narrow_convolution_matrices(ConvolutionMatrices& a);
void narrow_convolution_forward(const ConvolutionForward& a);
void narrow_convolution_weight(const ConvolutionWeight& a);

}  // namespace semiseg::SEMISEG_LEVEL

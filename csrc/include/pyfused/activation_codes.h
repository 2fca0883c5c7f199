// Which number stands for which activation? Those of pyfused/activations.py; tests/test_activations.py compares the two.
#pragma once

namespace pyfused {

enum ActivationCode : int { kIdentity = 0, kRelu = 1, kSilu = 2, kTanh = 3, kGelu = 4, kGeluTanh = 5, kQuickGelu = 6 };

}  // namespace pyfused

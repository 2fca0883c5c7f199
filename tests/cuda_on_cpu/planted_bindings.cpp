// Makes the launchers of planted.cu a Python module.
#include <pybind11/pybind11.h>

#include "planted.h"

PYBIND11_MODULE(planted, m) {
  m.def("sum", planted::sum);
  m.def("exchange", planted::exchange);
  m.def("read_beyond", planted::read_beyond);
  m.def("read_unwritten", planted::read_unwritten);
  m.def("launch_nothing", planted::launch_nothing);
  m.def("shuffle", planted::shuffle);
  m.def("break_shuffle", planted::break_shuffle);
  m.def("multiply_float16", planted::multiply<__half>);
  m.def("multiply_bfloat16", planted::multiply<__nv_bfloat16>);
  m.def("relay", planted::relay);
  m.def("count", planted::count);
  m.def("round_trip_float16", planted::round_trip<__half>);
  m.def("round_trip_bfloat16", planted::round_trip<__nv_bfloat16>);
}

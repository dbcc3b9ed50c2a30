// The Python module scrl_fast._host: each file of this folder adds its functions through one bind_<op>(module).
#include <pybind11/pybind11.h>

namespace scrl_fast::host {
void bind_augment_views(pybind11::module_& m);
void bind_sample_box_pairs(pybind11::module_& m);
void bind_sample_box_pairs_replay(pybind11::module_& m);
}  // namespace scrl_fast::host

PYBIND11_MODULE(_host, m) {
  m.doc() = "Input side of scrl_fast: NumPy in, NumPy out, GIL released.";
  scrl_fast::host::bind_augment_views(m);
  scrl_fast::host::bind_sample_box_pairs(m);
  scrl_fast::host::bind_sample_box_pairs_replay(m);
}

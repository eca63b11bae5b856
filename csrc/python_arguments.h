// An operation as a Python function of keyword arguments: each fills the member that arguments.h names so.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "python_voxels.h"

namespace semiseg {

class __attribute__((visibility("hidden"))) KeywordArguments {
 public:
  explicit KeywordArguments(const pybind11::kwargs& given) : given_(given) {}

  template <class Member>
  void operator()(const char* name, Member& member) const {
    if (!given_.contains(name)) throw pybind11::type_error(std::string("argument missing: ") + name);
    const pybind11::object value = given_[name];
    if constexpr (std::is_pointer_v<Member>) member = reinterpret_cast<Member>(value.cast<uintptr_t>());
    else member = value.cast<Member>();
    taken_.push_back(name);
  }

  void expect_no_more() const {
    if (taken_.size() == given_.size()) return;
    for (const auto& argument : given_) {
      const auto name = argument.first.cast<std::string>();
      if (std::find(taken_.begin(), taken_.end(), name) == taken_.end())
        throw pybind11::type_error("argument unknown: " + name);
    }
  }

 private:
  const pybind11::kwargs& given_;
  mutable std::vector<const char*> taken_;
};

// Adds the function `name`: run(operation, machine), without the interpreter's lock, where machine_arguments(machine,
// visit) names what the machine needs to know.
template <class Operation, class Machine, class Run>
void bind(pybind11::module_& module, const char* name, Direction direction, const Run& run) {
  module.def(name, [direction, run](const pybind11::kwargs& given) {
    Operation operation{};
    Machine machine{};
    const KeywordArguments visit(given);
    arguments(operation, direction, visit);
    machine_arguments(machine, visit);
    visit.expect_no_more();
    const pybind11::gil_scoped_release release;
    return run(operation, machine);
  });
}

}  // namespace semiseg

// What every table of a rule knows of it: fusedopt/rules.py.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "host_table.h"
#include "python/objects.h"

namespace fusedopt {

// Where a hyperparameter stands in a group: group[key], or group[key][item].
struct HyperKey {
  py::str key;
  int item;          // −1: the value itself
  Py_ssize_t items;  // that the value has, where it is not meant itself
};

struct FlagKey {
  py::str key;
  u32 bit;
};

// What asks for a state of a group's tensors: a hyperparameter that is not 0, a flag that is set, or their being there.
// As fusedopt/rules.py has it: `unseen` are the hyperparameters, as bits, that would have to be fetched from a GPU.
struct Need {
  int hyper = -1;
  u32 flag = 0;

  bool is_asked_by(const Hypers& hypers, u32 unseen) const {
    if (hyper >= 0) return hypers.value[hyper] != 0.0 || (unseen >> hyper & 1) != 0;
    return flag == 0 || (hypers.flags & flag) != 0;
  }
};

struct Schema {
  // `state_keys`: of each state its name, and the key that asks for it or "".
  Schema(const std::string& stem, const std::vector<std::pair<std::string, int>>& hyper_keys,
         const std::vector<std::pair<std::string, u32>>& flag_keys, const std::vector<std::string>& mode_keys,
         const std::vector<std::pair<std::string, std::string>>& state_keys, bool counts_always)
      : rule(rule_index(stem)), keeps_step(counts_always) {
    if (hyper_keys.size() > size_t(kHypers)) throw std::invalid_argument("a rule names at most 8 hyperparameters");
    for (const auto& [key, item] : hyper_keys) {
      Py_ssize_t items = 0;
      for (const auto& [other, last] : hyper_keys)
        if (other == key) items = std::max<Py_ssize_t>(items, last + 1);
      hypers.push_back({py::str(key), item, items});
    }
    for (const auto& [key, bit] : flag_keys) flags.push_back({py::str(key), bit});
    for (const std::string& key : mode_keys) modes.push_back(py::str(key));
    for (const auto& [name, asked_by] : state_keys) {
      states.push_back(py::str(name));
      needs.push_back(need_of(asked_by, hyper_keys, flag_keys));
    }
  }

  int rule;
  std::vector<HyperKey> hypers;
  std::vector<FlagKey> flags;
  std::vector<py::str> modes;   // keys that ask for a mode, or for what no group may ask
  std::vector<py::str> states;  // names, by slot
  std::vector<Need> needs;      // by slot
  bool keeps_step;

 private:
  static Need need_of(const std::string& key, const std::vector<std::pair<std::string, int>>& hyper_keys,
                      const std::vector<std::pair<std::string, u32>>& flag_keys) {
    if (key.empty()) return {};
    for (size_t h = 0; h < hyper_keys.size(); ++h)
      if (hyper_keys[h].first == key && hyper_keys[h].second < 0) return {int(h), 0};
    for (const auto& [name, bit] : flag_keys)
      if (name == key) return {-1, bit};
    throw std::invalid_argument("'" + key + "', which asks for a state, is neither one hyperparameter nor a flag");
  }
};

}  // namespace fusedopt

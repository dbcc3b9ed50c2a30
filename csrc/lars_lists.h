// What the CPU's and CUDA's forms of lars_step_ ask of their lists.
#pragma once
#include "lars_step.h"
#include "tensor_lists.h"

namespace scrl {

struct LarsNumbers {
  const std::optional<Tensor>&lr, &momentum, &ema_momentum, &skip_counter;
};

// The lists of lars_step_: params, momentum_buffers, grads [P], ema_targets, ema_places [T], settings [R, 7],
// setting_of [P]; ema_targets[k] belongs to params[ema_places[k]]. visit(facts, parameter, buffer, gradient) for each
// parameter, then visit_target(place, target) for each target. No two of the tensors share memory.
template <class List, class Visit, class VisitTarget>
void visit_lars_lists(const List& params, const List& momentum_buffers, const List& ema_targets, const List& grads,
                      const std::vector<int64_t>& ema_places, const std::vector<double>& settings,
                      const std::vector<int64_t>& setting_of, const LarsNumbers& numbers, const Visit& visit,
                      const VisitTarget& visit_target) {
  const char* what = "lars_step_";
  STD_TORCH_CHECK(setting_of.size() == params.size(), what, ": settings for each parameter are needed");
  const auto count = static_cast<int64_t>(params.size()), rows = static_cast<int64_t>(settings.size()) / kLarsSettings;
  STD_TORCH_CHECK(rows * kLarsSettings == static_cast<int64_t>(settings.size()), what, ": settings are rows of ",
                  kLarsSettings);
  for (int64_t row : setting_of) STD_TORCH_CHECK(row >= 0 && row < rows, what, ": no settings at ", row);
  std::vector<Facts> leaders;
  leaders.reserve(params.size());
  Memory memory(3 * params.size() + ema_targets.size() + 4);
  for (const auto* number : {&numbers.lr, &numbers.momentum, &numbers.ema_momentum}) memory.add(*number, false);
  memory.add(numbers.skip_counter, true);
  const auto note = [&](const Facts& facts, AtenTensorHandle tensor, bool written) {
    memory.add(const_data(tensor), facts.count * floating_bytes(facts.dtype), written);
  };
  visit_alike(
      what,
      [&](const Facts& facts, AtenTensorHandle param, AtenTensorHandle buffer, AtenTensorHandle gradient) {
        leaders.push_back(facts);
        note(facts, param, true), note(facts, buffer, true), note(facts, gradient, false);
        visit(facts, param, buffer, gradient);
      },
      params, momentum_buffers, grads);
  STD_TORCH_CHECK(ema_places.size() == ema_targets.size(), what, ": a place for each of ema_targets is needed");
  for (size_t k = 0; k < ema_targets.size(); ++k) {
    STD_TORCH_CHECK(ema_places[k] >= 0 && ema_places[k] < count, what, ": no parameter at ", ema_places[k]);
    const AtenTensorHandle target = handle_at(ema_targets, k);
    STD_TORCH_CHECK(lie_alike(leaders[ema_places[k]], facts_of(target)), what, ": EMA target ", k, " lies differently");
    note(leaders[ema_places[k]], target, true);
    visit_target(ema_places[k], target);
  }
  memory.check(what);
}

}  // namespace scrl

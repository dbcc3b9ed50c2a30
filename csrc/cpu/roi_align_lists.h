// What the backward pass of RoIAlign looks up: which of an image's boxes read a cell, a block of cells, or a row.
#pragma once
#include <algorithm>

#include "cpu/roi_align_boxes.h"

namespace scrl::roi {

// For every cell of the map, which boxes of an image read it.
template <class T>
struct CellLists {
  struct Entry {
    int32_t box;
    T weight;
  };
  std::vector<int32_t> first;  // [cells + 1]
  std::vector<Entry> entries;
};

template <class T, class Visit>  // visit(cell, weight) of a box's only bin
void for_each_cell(const Problem& p, const Weights<T>& weights, int64_t box, const Visit& visit) {
  for (const RowTap<T>* row = weights.rows_begin(box); row != weights.rows_end(box); ++row)
    for (const Tap<T>* column = weights.columns_begin(box, 0); column != weights.columns_end(box, 0); ++column)
      visit(row->row * p.width + column->cell, row->weight * column->weight);
}

template <class T>
void assign_lists(CellLists<T>& lists, const Problem& p, const Weights<T>& weights, int64_t boxes) {
  lists.first.assign(p.cells() + 1, 0);
  for (int64_t box = 0; box < boxes; ++box)
    for_each_cell(p, weights, box, [&](int64_t cell, T) { ++lists.first[cell]; });
  int32_t total = 0;
  for (int32_t& first : lists.first) total += first, first = total;  // ends: filled backwards, they become beginnings
  lists.entries.resize(total);
  for (int64_t box = boxes - 1; box >= 0; --box)
    for_each_cell(p, weights, box, [&](int64_t cell, T weight) {
      lists.entries[--lists.first[cell]] = {static_cast<int32_t>(box), weight};
    });
}

// Weights of every box and cell of a small map, and for each block of cells the boxes that reach it.
template <class T>
struct DenseWeights {
  int64_t padded;                     // cells, up to whole blocks
  std::vector<T> weights;             // [boxes, padded]
  std::vector<int32_t> first, boxes;  // block b is reached by boxes[first[b], first[b + 1])
};

template <class T>
void assign_dense(DenseWeights<T>& dense, const Problem& p, const Weights<T>& weights, int64_t boxes, int64_t block) {
  dense.padded = (p.cells() + block - 1) / block * block;
  dense.weights.assign(boxes * dense.padded, T(0));
  for (int64_t box = 0; box < boxes; ++box)
    for_each_cell(p, weights, box, [&](int64_t cell, T weight) { dense.weights[box * dense.padded + cell] += weight; });
  dense.first.assign(1, 0), dense.boxes.clear();
  for (int64_t begin = 0; begin < dense.padded; begin += block) {
    for (int64_t box = 0; box < boxes; ++box) {
      const T* of_box = dense.weights.data() + box * dense.padded + begin;
      if (std::any_of(of_box, of_box + block, [](T weight) { return weight != T(0); }))
        dense.boxes.push_back(static_cast<int32_t>(box));
    }
    dense.first.push_back(static_cast<int32_t>(dense.boxes.size()));
  }
}

// For every row of the map, which boxes of an image read it and where their taps of this row are.
template <class T>
struct RowLists {
  struct Visit {
    int32_t box;
    const RowTap<T>*begin, *end;
  };
  std::vector<int64_t> first;  // [height + 1]
  std::vector<Visit> visits;
};

template <class T>
void assign_lists(RowLists<T>& lists, const Problem& p, const Weights<T>& weights, int64_t boxes) {
  const auto for_each = [&](int64_t box, const auto& visit) {
    for (const RowTap<T>*row = weights.rows_begin(box), *next; row != weights.rows_end(box); row = next) {
      for (next = row + 1; next != weights.rows_end(box) && next->row == row->row;) ++next;
      visit(row, next);
    }
  };
  lists.first.assign(p.height + 1, 0);
  for (int64_t box = 0; box < boxes; ++box)
    for_each(box, [&](const RowTap<T>* row, const RowTap<T>*) { ++lists.first[row->row]; });
  int64_t total = 0;
  for (int64_t& first : lists.first) total += first, first = total;
  lists.visits.resize(total);
  for (int64_t box = boxes - 1; box >= 0; --box)
    for_each(box, [&](const RowTap<T>* row, const RowTap<T>* next) {
      lists.visits[--lists.first[row->row]] = {static_cast<int32_t>(box), row, next};
    });
}

}  // namespace scrl::roi

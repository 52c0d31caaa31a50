// A counting sort of edges by a node, in three passes over the index; and what takes read, in that order.
#include <cstdint>
#include <cstring>

namespace {
template <class I>
int64_t group_(const I* key, int64_t edges, int64_t nodes, int32_t* pointer, int32_t* order) {
  memset(pointer, 0, (nodes + 1) * sizeof(int32_t));
  bool sorted = true;
  I before = 0;
  for (int64_t e = 0; e < edges; e++) {
    I node = key[e] < 0 ? key[e] + (I)nodes : key[e];
    if (node < 0 || node >= nodes) return -1;
    sorted &= node >= before;
    before = node;
    pointer[node + 1]++;
  }
  for (int64_t i = 0; i < nodes; i++) pointer[i + 1] += pointer[i];
  if (sorted) return 1;
  for (int64_t e = 0; e < edges; e++) {  // each pointer moves on to where its node's edges end
    I node = key[e] < 0 ? key[e] + (I)nodes : key[e];
    order[pointer[node]++] = (int32_t)e;
  }
  memmove(pointer + 1, pointer, nodes * sizeof(int32_t));
  pointer[0] = 0;
  return 0;
}

template <class I>
int64_t arrange_(const I* index, const int32_t* order, int64_t edges, int64_t nodes, int32_t* out) {
  bool wrong = false;
  for (int64_t k = 0; k < edges; k++) {
    I node = index[order ? order[k] : k];
    node = node < 0 ? node + (I)nodes : node;
    wrong |= node < 0 || node >= nodes;
    out[k] = (int32_t)node;
  }
  return wrong ? -1 : 0;
}
}  // namespace

// pointer: nodes + 1; order: edges. Returns 1 if the edges are in order, and `order` was not written; -1 if a key is
// out of range. Negative keys count from the end.
extern "C" int64_t group(const void* key, int32_t wide, int64_t edges, int64_t nodes, int32_t* pointer, int32_t* order) {
  return wide ? group_((const int64_t*)key, edges, nodes, pointer, order)
              : group_((const int32_t*)key, edges, nodes, pointer, order);
}

// out[k] = index[order[k]]; -1 if one is out of range.
extern "C" int64_t arrange(const void* index, int32_t wide, const int32_t* order, int64_t edges, int64_t nodes,
                           int32_t* out) {
  return wide ? arrange_((const int64_t*)index, order, edges, nodes, out)
              : arrange_((const int32_t*)index, order, edges, nodes, out);
}

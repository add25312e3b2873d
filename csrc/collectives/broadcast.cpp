#include "collectives/broadcast.h"

namespace adareduce {

BroadcastSchedule make_broadcast_schedule(Rank rank, int size, Rank root) {
  // Ranks are counted from the root. A rank's parent lacks its lowest bit; its children add one bit
  // below that.
  const int place = (rank - root + size) % size;
  BroadcastSchedule schedule;
  int bit = 1;
  while (bit < size && (place & bit) == 0) bit *= 2;
  if (place != 0) schedule.parent = (place - bit + root) % size;
  for (bit /= 2; bit > 0; bit /= 2)
    if (place + bit < size) schedule.children.push_back((place + bit + root) % size);
  return schedule;
}

Task broadcast(Context context, BroadcastSchedule schedule, void* data, std::int64_t bytes) {
  const std::int64_t num_pieces = (bytes + kBroadcastPiece - 1) / kBroadcastPiece;
  const bool is_root = schedule.parent < 0;
  const auto piece = [&](std::int64_t index) {
    return clip({index * kBroadcastPiece, (index + 1) * kBroadcastPiece}, {0, bytes});
  };
  // In step k piece k arrives and piece k-1 goes on; the root has nothing to wait for.
  for (std::int64_t step = is_root ? 1 : 0; step <= num_pieces; ++step) {
    std::vector<RecvPart> receives;
    std::vector<SendPart> sends;
    if (!is_root && step < num_pieces)
      receives.push_back({schedule.parent, at(data, piece(step).begin, 1), piece(step).size()});
    if (step > 0)
      for (const Rank child : schedule.children)
        sends.push_back({child, at(data, piece(step - 1).begin, 1), piece(step - 1).size()});
    co_await context.transport.start(kDataTag, sends, receives);
  }
}

}  // namespace adareduce

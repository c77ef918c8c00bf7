"""Which snapshots stay, once more in plain Python: a part of the naive engine."""

from hbmgym.memory_backend.placement import make_placement, place_checkpoints

MOST_BEHIND = 4096


class NaiveRetention:
    """What one rule knows of pages and rows, and what it keeps."""

    def __init__(self, text: str, page_tokens: int):
        self.name, _, number = text.rpartition("-")
        if not self.name:
            self.name, number = text, "0"
        self.number = int(number)
        self.interval = -(-self.number // page_tokens)
        self.children: dict[int, set[int]] = {}
        self.boundary: dict[int, int] = {}
        self.overlaps = {0: 1}
        self.planned: dict[int, list[int]] = {}

    def publish(self, page_id: int, parent: int | None) -> None:
        """A page becomes resident, so nothing continues it yet."""
        self.children[page_id] = set()
        if parent is not None:
            self.children[parent].add(page_id)

    def admit(self, job, boundary: int, computed: int, overlap: int, with_snapshot: set[int]) -> None:
        """`computed`: pages of the job that are not prefilled; `with_snapshot`: depths on its path."""
        if self.name != "optimal":
            return
        path = job.ids[:boundary]
        if job.preemptions == 0:
            if overlap:
                behind = min(max(self.boundary.get(path[overlap - 1], 0) - overlap, 0), MOST_BEHIND)
                self.overlaps[behind] = self.overlaps.get(behind, 0) + 1
            self.boundary.update(dict.fromkeys(path, boundary))
        placement = make_placement(boundary, self.number)
        for depth in range(1, boundary + 1):
            placement.before[depth] = self.overlaps.get(min(boundary - depth, MOST_BEHIND), 0)
            placement.allowed[depth] = depth > computed or depth in with_snapshot
        count = place_checkpoints(placement, boundary)  # compared with brute force in test_placement.py
        self.planned[job.row] = placement.chosen[:count].tolist()

    def depths_to_save(self, job, boundary: int) -> set[int]:
        """Beside the branch point and the boundary."""
        if self.name == "interval":
            return set(range(self.interval, boundary, self.interval))
        return {depth for depth in self.planned.get(job.row, ()) if depth <= boundary}

    def dropped(self, job, depth: int, boundary: int, with_snapshot: set[int], held: set[int]) -> list[int]:
        """Page ids whose snapshots go when the job's path has one at `depth`, shallowest first; not those `held`."""
        shared = held | {d for d in with_snapshot if len(self.children[job.ids[d - 1]]) > 1}
        if self.name == "path-cap":
            excess = max(sum(d <= depth for d in with_snapshot) - self.number, 0)
            gone = sorted(d for d in with_snapshot - shared if d < depth)[:excess]
        elif self.name == "all" or depth < boundary or (depth > boundary and boundary in with_snapshot):
            gone = []
        else:
            kept = shared | self.depths_to_save(job, boundary)
            gone = sorted(d for d in with_snapshot - kept if d < boundary)
        return [job.ids[d - 1] for d in gone]

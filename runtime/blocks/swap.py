"""Block ids of a second pool, in host memory: where sequences that gave up their blocks keep what was computed."""

from runtime.blocks.pool import BlockPool


class SwapSpace:
    """`num_blocks` ids, each held by at most one sequence."""

    def __init__(self, num_blocks: int) -> None:
        self._pool = BlockPool(num_blocks)
        self._held: dict[int, list[int]] = {}
        """By the position in memory of the list that was handed out."""

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free

    def take(self, count: int) -> list[int]:
        """`count` blocks, of at most `num_free`. What raises leaves everything as it was."""
        blocks: list[int] = []
        try:
            while len(blocks) < count:
                blocks.append(self._pool.take())
        except BaseException:
            for block in blocks:
                self._pool.release(block, reusable=False)
            raise
        self._held[id(blocks)] = blocks
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Give back what `take` returned."""
        del self._held[id(blocks)]
        for block in blocks:
            self._pool.release(block, reusable=False)

    def check_integrity(self) -> None:
        """Raise `AssertionError` when a block is lost or held twice."""
        self._pool.check_integrity(self._held.values())

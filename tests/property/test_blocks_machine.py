"""A hypothesis state machine over pool, index and tables: a model of what every block holds, kept beside them."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from runtime.blocks import BlockManager, BlockTable, KeyChain
from runtime.support import failpoints

SIZE, BLOCKS = 2, 8


class Sequence:
    def __init__(self, table: BlockTable, chain: KeyChain, tokens: list[int], adapter: str) -> None:
        self.table, self.chain, self.tokens, self.adapter = table, chain, tokens, adapter


class BlocksMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(BLOCKS, SIZE)
        self.sequences: list[Sequence] = []
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}
        """Block → adapter and all tokens up to its end: what was really written there."""

    def _write(self, sequence: Sequence) -> None:
        table, tokens = sequence.table, sequence.tokens
        for number in range(max(table.num_indexed, table.num_dropped), len(table.blocks)):
            self.content[table.blocks[number]] = (sequence.adapter, tuple(tokens[: (number + 1) * SIZE]))
        self.manager.index(table, tokens, len(tokens), sequence.chain)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10), adapter=st.sampled_from("ab"))
    def adopt(self, tokens: list[int], adapter: str) -> None:
        chain = self.manager.chain(adapter=adapter)
        match = self.manager.match(tokens, chain)
        assert match.num_tokens < len(tokens)
        for number, block in enumerate(match.blocks):
            assert self.content[block] == (adapter, tuple(tokens[: (number + 1) * SIZE])), "stale content was found"
        if match.start_of is not None:
            whose, content = self.content[match.start_of]
            assert match.num_tokens % SIZE, "a whole block is shared, not copied"
            assert (whose, content[: match.num_tokens]) == (adapter, tuple(tokens[: match.num_tokens]))
        if self.manager.can_adopt(match, len(tokens)):
            sequence = Sequence(self.manager.adopt(match, len(tokens)), chain, tokens, adapter)
            self.sequences.append(sequence)
            self._write(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def grow(self, data: st.DataObject, more: list[int]) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        if self.manager.can_grow(sequence.table, len(sequence.tokens) + len(more)):
            self.manager.grow(sequence.table, len(sequence.tokens) + len(more))
            sequence.tokens = sequence.tokens + more
            self._write(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(self.sequences))
        shared = data.draw(st.integers(0, len(source.tokens)))
        if self.manager.can_fork(source.table, shared, shared + 1):
            fork = self.manager.fork(source.table, shared, shared + 1)
            assert all(target in fork.table.blocks and origin in source.table.blocks for origin, target in fork.copies)
            chain = self.manager.chain(adapter=source.adapter)
            sequence = Sequence(fork.table, chain, [*source.tokens[:shared], 1], source.adapter)
            self.sequences.append(sequence)
            self._write(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def slide(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        self.manager.drop_behind(sequence.table, data.draw(st.integers(0, len(sequence.tokens))))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), forget=st.booleans())
    def free(self, data: st.DataObject, forget: bool) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(sequence)
        self.manager.free(sequence.table, forget=forget)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), at=st.integers(1, 3))
    def failing_growth(self, data: st.DataObject, at: int) -> None:
        table = data.draw(st.sampled_from(self.sequences)).table
        before = list(table.blocks)
        wanted = len(table.blocks) * SIZE + 3 * SIZE
        if self.manager.can_grow(table, wanted):
            failpoints.configure(f"blocks.take=raise:{at}")
            try:
                self.manager.grow(table, wanted)
            except failpoints.FailpointError:
                assert table.blocks == before
            finally:
                failpoints.configure("")

    @rule()
    def reset(self) -> None:
        self.manager.reset_prefixes()

    @invariant()
    def counts_add_up(self) -> None:
        self.manager.check_integrity()
        held = {block for sequence in self.sequences for block in sequence.table.held}
        assert self.manager.num_free == BLOCKS - len(held)


BlocksMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestBlocks = BlocksMachine.TestCase

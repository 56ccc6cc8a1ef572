"""The main loop of a disassembled kernel: how many instructions a warp executes for one tile.

Registers, spills and counts of the whole kernel do not show instructions that are added to its loop. A warp executes
one path through it: with masks, rescaling and other exceptions skipped, but with all loads and products.
"""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Iterable
from functools import cache

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+) )?\s*([A-Z][\w.]*)([^;]*);")
PRODUCT = re.compile(r"HG?MMA")  # on tensor cores
WORK = re.compile(r"HG?MMA|LDSM|LDGSTS|STS.128")  # the path passes all of them

Block = list[str]  # names of instructions


def blocks_of(code: Iterable[str]) -> tuple[list[Block], list[list[int]]]:
    """Return the basic blocks of a function's disassembly, and the successors of each."""
    blocks: list[Block] = [[]]
    labels: dict[str, int] = {}
    targets: dict[int, str] = {}
    falls: set[int] = set()  # blocks that continue with the next

    def cut(continues: bool) -> None:
        if continues:
            falls.add(len(blocks) - 1)
        blocks.append([])

    for line in code:
        if label := re.match(r"(\.L_x_\d+):", line):
            cut(True)
            labels[label[1]] = len(blocks) - 1
        elif found := INSTRUCTION.match(line):
            predicate, name, operands = found.groups()
            blocks[-1].append(name)
            if target := re.search(r"`\((\.L_x_\d+)\)", operands) if name.startswith("BRA") else None:
                targets[len(blocks) - 1] = target[1]
            if re.match(r"BRA|EXIT|RET", name):
                # BRA.U P0 and the like have their condition among the operands
                cut(predicate is not None or re.match(r"\s*!?U?P\d", operands) is not None)
    successors = [
        [*([labels[targets[i]]] if i in targets else []), *([i + 1] if i in falls and i + 1 < len(blocks) else [])]
        for i in range(len(blocks))
    ]
    return blocks, successors


def loops_of(successors: list[list[int]]) -> dict[int, set[int]]:
    """Return the nodes of each natural loop, by its header."""
    before = collections.defaultdict(list)
    for node, following in enumerate(successors):
        for other in following:
            before[other].append(node)
    loops: dict[int, set[int]] = {}
    # Depth first from the entry: an edge to a node of the current path closes a loop.
    state = {0: 1}
    stack = [(0, iter(successors[0]))]
    while stack:
        node, unseen = stack[-1]
        for other in unseen:
            if state.get(other) == 1:
                body, work = loops.setdefault(other, {other}), [node]
                while work:
                    if (at := work.pop()) not in body:
                        body.add(at)
                        work += before[at]
            elif other not in state:
                state[other] = 1
                stack.append((other, iter(successors[other])))
                break
        else:
            state[node] = 2
            stack.pop()
    return loops


def pass_through(header: int, body: set[int], blocks: list[Block], successors: list[list[int]]) -> Block:
    """Return the instructions of the shortest path from the header to itself with the most of WORK."""
    visiting: set[int] = set()

    def order(path: Block) -> tuple[int, int]:
        return sum(1 for name in path if WORK.match(name)), -len(path)

    @cache
    def longest(node: int) -> Block | None:
        visiting.add(node)
        rest: list[Block] = []
        for other in successors[node]:
            if other == header:
                rest.append([])
            elif other in body and other not in visiting and (found := longest(other)) is not None:
                rest.append(found)
        visiting.discard(node)
        return [*blocks[node], *max(rest, key=order)] if rest else None

    return longest(header) or []


def main_loop(code: Iterable[str]) -> Block:
    """Return what a warp executes in one pass through the innermost loop with the most tensor-core instructions."""
    blocks, successors = blocks_of(code)
    loops = sorted(loops_of(successors).items(), key=lambda loop: len(loop[1]))
    paths = [pass_through(header, body, blocks, successors) for header, body in loops]
    return max(itertools.chain(paths, [[]]), key=lambda path: sum(1 for name in path if PRODUCT.match(name)))

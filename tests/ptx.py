"""What nvcc makes of csrc/kernels/cuda, run on the CPU: an interpreter of the PTX that it emits, in numpy.

    module = Module(text)                       each kernel becomes a Python function for each of its basic blocks
    memory = Memory(bytes); memory.alloc(...)   device memory, red zones between allocations
    launch = Launch(module.kernels["Tiles float"], memory, grid, block, shared, params); launch.run()

All threads of a launch go in lock-step, the basic block of the lowest place first. A `Fault` is what compute-sanitizer
would report: an address out of bounds or unaligned, a write to a tensor that is only read, a data race (what happens
before what follows from bar.sync, and from release and acquire of the gpu's scope), a warp that isn't whole at an
instruction which wants all of it, a barrier that not every thread of a block reaches. `launch.stats` counts reads of
memory that nobody wrote, loads, 32-byte sectors and shared memory's waves, each against the fewest possible.

It knows the instructions that these kernels have; another is a Fault that names it.
"""

import re

import numpy as np

BASE = 0x7F0000000000
"""Device addresses begin here: none is a small number, and none the host's."""


class Fault(Exception):
    """What a kernel must not do, or an instruction that isn't known here."""


class Memory:
    """Device memory of `size` bytes. What nobody has written is NaN in every type."""

    def __init__(self, size):
        size = (size + 7) // 8 * 8
        self.u8 = np.zeros(size, np.uint8)
        self.views = {1: self.u8, 2: self.u8.view(np.uint16), 4: self.u8.view(np.uint32), 8: self.u8.view(np.uint64)}
        self.valid = np.zeros(size, bool)
        self.init = np.zeros(size, bool)
        self.readonly = np.zeros(size, bool)
        self.top = 4096

    def alloc(self, nbytes, align=256, offset=0, init=None, readonly=False):
        """The address of `nbytes`, `offset` behind a multiple of `align`, which hold the bytes `init`, if any."""
        at = (self.top + align - 1) // align * align + offset
        self.top = at + nbytes + 512
        assert self.top < self.u8.size, "arena too small"
        self.valid[at : at + nbytes] = True
        self.u8[at : at + nbytes] = 0xFF
        if init is not None:
            self.u8[at : at + nbytes] = np.frombuffer(init, np.uint8)
            self.init[at : at + nbytes] = True
        self.readonly[at : at + nbytes] = readonly
        return BASE + at

    def read(self, address, nbytes):
        """Bytes at an address."""
        at = address - BASE
        return self.u8[at : at + nbytes].tobytes()


TYPES = {
    "b8": np.uint8,
    "u8": np.uint8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
}
# Of instructions whose result is one expression of their operands {1}, {2}, {3}, which have the result's type.
FORMULAS = {
    "mov": "{1}",
    "cvta": "{1}",
    "add": "{1} + {2}",
    "sub": "{1} - {2}",
    "mad": "{1} * {2} + {3}",
    "fma": "S.fma({1}, {2}, {3})",
    "sqrt": "np.sqrt({1})",
    "abs": "np.abs({1})",
    "neg": "-{1}",
    "and": "{1} & {2}",
    "or": "{1} | {2}",
    "xor": "{1} ^ {2}",
    "not": "~{1}",
}
# {0} is a label's place, {1} that of the next instruction, {2} its own.
FLOW = {
    "bra": "S.pc[I] = {0}",
    "ret": "S.exit(I)",
    "trap": "raise Fault('trap')",
    "bar": "S.barrier(I, {1}, {2})",
    "barrier": "S.barrier(I, {1}, {2})",
}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNORDERED = {"geu": "<", "gtu": "<=", "ltu": ">=", "leu": ">", "neu": "=="}
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def parse(text):
    """{mangled name: (regs, [instruction], {label: index})}"""
    kernels = {}
    for m in re.finditer(r"\.entry\s+(\w+)\(\s*\.param[^\[]*\[(\d+)\]\s*\)(.*?)\n\{(.*?)\n\}", text, re.S):
        name, size, _, body = m.groups()
        regs, code, labels = {}, [], {}
        body = re.sub(r"//[^\n]*", "", body)
        body = re.sub(r'\.pragma "[^"]*";', "", body)
        body = re.sub(r"(?m)^\s*\{(\s+(?:cvt|mul|sub|fma)[^}]*)\}", r"\1", body)  # inline asm in braces
        for line in re.split(r";|(?<=:)\n", body):
            line = line.strip()
            while lm := re.match(r"(\$\w+):\s*", line):
                labels[lm.group(1)] = len(code)
                line = line[lm.end() :].strip()
            if not line:
                continue
            if line.startswith(".reg"):
                kind, prefix = re.match(r"\.reg\s+\.(\w+)\s+(%\w+)<\d+>", line).groups()
                regs[prefix] = kind
                continue
            g = re.match(r"(?:@(!?)(%p\d+)\s+)?([\w.]+)\s*(.*)$", line, re.S)
            neg, pred, op, rest = g.groups()
            ops = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)
            code.append((pred, bool(neg), op, [o.strip() for o in ops]))
        kernels[name] = (regs, code, labels, int(size))
    return kernels


def split_list(o):
    return [x.strip() for x in o.strip("{}").split(",")]


class Program:
    """One kernel, translated to a Python function per basic block."""

    def __init__(self, name, regs, code, labels, param_size):
        self.name, self.code, self.param_size = name, code, param_size
        self.kinds = regs
        leaders = {0} | set(labels.values())
        for i, (_, _, op, _) in enumerate(code):
            if op.startswith(("bra", "bar.sync", "barrier.sync", "ret", "trap", "ld.acquire", "atom")):
                leaders.add(i + 1)
                if op.startswith(("bar", "ld.acquire", "atom")):
                    leaders.add(i)
        self.leaders = sorted(x for x in leaders if x < len(code))
        self.labels = labels
        self.blocks, self.length = {}, {}
        lines = []
        for n, start in enumerate(self.leaders):
            end = self.leaders[n + 1] if n + 1 < len(self.leaders) else len(code)
            self.length[start] = end - start
            lines.append(f"def b{start}(S, R, I):\n")
            body = [self.emit(i) for i in range(start, end)]
            lines += [f"  {l}\n" for b in body for l in b]
            predicate, _, last, _ = self.code[end - 1]
            goes_on = bool(predicate) or not last.startswith(("bra", "ret", "bar", "trap"))
            if goes_on and not last.startswith(("bra", "bar")):
                lines.append(f"  S.pc[I] = {end}\n")
            lines.append("  return\n")
        source = "".join(lines)
        space = {"np": np, "f32": np.float32, "Fault": Fault}
        exec(compile(source, name, "exec"), space)
        for start in self.leaders:
            self.blocks[start] = space[f"b{start}"]

    # --- operands
    def val(self, o, t):
        """Expression for operand o as numpy dtype of PTX type t."""
        d = TYPES[t]
        if o.startswith("%"):
            if o == "%tid.x":
                return "S.tid[I]"
            if o in ("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"):
                return "np.uint32(0)"
            if o in ("%nctaid.y", "%nctaid.z", "%ntid.y", "%ntid.z"):
                return "np.uint32(1)"
            if o == "%ctaid.x":
                return "S.cta[I]"
            if o == "%nctaid.x":
                return "np.uint32(S.grid)"
            if o == "%ntid.x":
                return "np.uint32(S.block)"
            if o in ("%envreg1", "%envreg2"):
                return f"np.uint32(S.{o[1:]})"
            if self.regbytes(o) > np.dtype(d).itemsize:  # a wider register: its low bits
                raw = RAW[np.dtype(d).itemsize].__name__
                return f"R['{o}'][I].astype(np.{raw}).view(np.{d.__name__})"
            return f"R['{o}'].view(np.{d.__name__})[I]"
        if o.startswith("0f"):
            return f"np.array([0x{o[2:]}], np.uint32).view(np.float32)[0]"
        if re.match(r"-?\d+$", o):
            bits = int(o) & ((1 << (8 * np.dtype(d).itemsize)) - 1)
            raw = RAW[np.dtype(d).itemsize]
            return f"np.array([{bits}], np.{raw.__name__}).view(np.{d.__name__})[0]"
        if re.match(r"0x", o):
            return f"np.{d.__name__}({int(o, 16)})"
        if o.endswith("_param_0"):
            return "np.uint64(0)"  # an address in param space
        if "memory" in o:
            return "np.uint32(0)"  # dynamic shared memory starts at 0
        raise Fault(f"operand {o}")

    def pred(self, o):
        if o.startswith("%"):
            return f"R['{o}'][I]"
        return f"np.bool_({o})"

    def dst(self, o, t, expr):
        d = TYPES[t]
        assert self.regbytes(o) == np.dtype(d).itemsize, (o, t)
        return f"R['{o}'].view(np.{d.__name__})[I] = {expr}"

    def addr(self, o):
        m = re.match(r"\[\s*([^\]+]+?)\s*(?:\+(-?\d+))?\]$", o)
        base, off = m.group(1), int(m.group(2) or 0)
        return base, off

    def emit(self, i):
        """Lines of Python for the instruction at `i`."""
        predicate, negated, op, o = self.code[i]
        head, *_ = op.split(".")
        t = op.split(".")[-1]
        if predicate:
            assert head == "bra"
            condition = f"{'~' if negated else ''}R['{predicate}'][I]"
            return [f"S.pc[I] = np.where({condition}, {self.labels[o[0]]}, {i + 1})"]
        if head in FLOW:
            return [FLOW[head].format(self.labels.get(o[0] if o else ""), i + 1, i)]
        if head in ("and", "or", "xor", "not", "mov") and t == "pred":
            return [f"R['{o[0]}'][I] = " + FORMULAS[head].format(None, *map(self.pred, o[1:]))]
        if head == "mov" and "{" in o[0] + o[1]:
            return self._halves(o)
        if head in FORMULAS:
            assert op in (f"{head}.{t}", f"{head}.rn.{t}", f"{head}.lo.{t}", f"cvta.to.global.{t}", f"cvta.{t}"), op
            return [self.dst(o[0], t, FORMULAS[head].format(None, *(self.val(x, t) for x in o[1:])))]
        special = getattr(self, f"_{head}", None)
        if special is None:
            raise Fault(f"unknown instruction {op} {o}")
        return special(op.split("."), o, i)

    def _halves(self, o):
        """mov of two 16-bit registers to one of 32 bits, or back."""
        if o[0].startswith("{"):
            low, high = split_list(o[0])
            whole = f"_v = {self.val(o[1], 'b32')}"
            return [whole, f"R['{low}'][I] = _v & np.uint32(0xffff)", f"R['{high}'][I] = _v >> np.uint32(16)"]
        low, high = (f"R['{name}'][I].astype(np.uint32)" for name in split_list(o[1]))
        return [self.dst(o[0], "b32", f"{low} | ({high} << np.uint32(16))")]

    def _mul(self, parts, o, i):
        t = parts[-1]
        a, b = self.val(o[1], t), self.val(o[2], t)
        if parts[1] == "wide":
            t = {"s32": "s64", "u32": "u64", "u16": "u32", "s16": "s32"}[t]
            wide = TYPES[t].__name__
            return [self.dst(o[0], t, f"{a}.astype(np.{wide}) * np.{wide}({b})")]
        if parts[1] == "hi":
            assert t == "s32"
            product = f"{a}.astype(np.int64) * np.int64({b})"
            return [self.dst(o[0], t, f"(({product}) >> np.int64(32)).astype(np.int32)")]
        return [self.dst(o[0], t, f"{a} * {b}")]

    def _div(self, parts, o, i):
        t = parts[-1]
        a, b = self.val(o[1], t), self.val(o[2], t)
        return [self.dst(o[0], t, f"{a} / {b}" if t == "f32" else f"S.div({a}, {b})")]

    def _max(self, parts, o, i):
        t = parts[-1]
        function = f"np.f{parts[0]}" if t == "f32" else f"np.{parts[0]}imum"
        return [self.dst(o[0], t, f"{function}({self.val(o[1], t)}, {self.val(o[2], t)})")]

    _min = _max

    def _shl(self, parts, o, i):
        t, by = parts[-1], int(o[2])
        assert 0 <= by < 8 * np.dtype(TYPES[t]).itemsize
        sign = "<<" if parts[0] == "shl" else ">>"
        return [self.dst(o[0], t, f"{self.val(o[1], t)} {sign} np.{TYPES[t].__name__}({by})")]

    _shr = _shl

    def _bfi(self, parts, o, i):
        t, at, length = parts[-1], int(o[3]), int(o[4])
        mask = ((1 << length) - 1) << at
        others = ((1 << (8 * np.dtype(TYPES[t]).itemsize)) - 1) & ~mask
        d = TYPES[t].__name__
        moved = f"({self.val(o[1], t)} << np.{d}({at})) & np.{d}({mask})"
        return [self.dst(o[0], t, f"({self.val(o[2], t)} & np.{d}({others})) | ({moved})")]

    def _selp(self, parts, o, i):
        t = parts[-1]
        return [self.dst(o[0], t, f"np.where({self.pred(o[3])}, {self.val(o[1], t)}, {self.val(o[2], t)})")]

    def _setp(self, parts, o, i):
        a, b = self.val(o[1], parts[-1]), self.val(o[2], parts[-1])
        if parts[1] in UNORDERED:  # true where either is NaN
            return [f"R['{o[0]}'][I] = ~({a} {UNORDERED[parts[1]]} {b})"]
        return [f"R['{o[0]}'][I] = {a} {COMPARISONS[parts[1]]} {b}"]

    def _cvt(self, parts, o, i):
        op = ".".join(parts)
        to, of = parts[-2], parts[-1]
        if op == "cvt.rna.tf32.f32":
            return [self.dst(o[0], "b32", f"S.tf32({self.val(o[1], 'f32')})")]
        if op == "cvt.f32.f16":
            return [self.dst(o[0], "f32", f"R['{o[1]}'][I].view(np.float16).astype(np.float32)")]
        if op == "cvt.rn.f16.f32":
            return [self.dst(o[0], "b16", f"{self.val(o[1], 'f32')}.astype(np.float16).view(np.uint16)")]
        if op == "cvt.rn.bf16.f32":
            return [self.dst(o[0], "b16", f"S.bf16({self.val(o[1], 'f32')})")]
        if op == "cvt.sat.f32.f32":
            clipped = "np.where(np.isnan(_v), f32(0), np.clip(_v, f32(0), f32(1)))"
            return [f"_v = {self.val(o[1], 'f32')}", self.dst(o[0], "f32", clipped)]
        return [self.dst(o[0], to, f"{self.val(o[1], of)}.astype(np.{TYPES[to].__name__})")]

    def _ld(self, parts, o, i):
        head, space, t = parts[0], parts[1], parts[-1]
        vector = int(parts[2][1:]) if re.match(r"v\d$", parts[2]) else 1
        width = np.dtype(TYPES[t]).itemsize
        where, what = (o[1], o[0]) if head == "ld" else (o[0], o[1])
        base, offset = self.addr(where)
        names = split_list(what) if vector > 1 else [what]
        if space == "acquire":
            assert parts == ["ld", "acquire", "gpu", "u32"]
            return [f"R['{what}'][I] = S.acquire(I, {self.val(base, 'u64')} + np.uint64({offset}))"]
        if space == "param":
            return self._param(names, f"{self.val(base, 'u64')} + np.uint64({offset})", t)
        kind = "uint64" if space == "global" else "uint32"  # negative offsets wrap
        offset &= (1 << (64 if space == "global" else 32)) - 1
        at = f"({self.val(base, 'u64' if space == 'global' else 'u32')} + np.{kind}({offset}))"
        if head == "ld":
            raw = RAW[width].__name__
            lines = [f"_v = S.load_{space}(I, {at}, {width}, {vector}, {i})"]
            for k, name in enumerate(names):
                view = f".view(np.{raw})" if self.regbytes(name) == width else ""
                lines.append(f"R['{name}']{view}[I] = _v[{k}]")
            return lines
        values = ", ".join(self.val(name, {1: "b8", 2: "b16", 4: "b32", 8: "b64"}[width]) for name in names)
        return [f"S.store_{space}(I, {at}, {width}, {vector}, ({values},), {i})"]

    _st = _ld

    def _param(self, names, at, t):
        size = np.dtype(TYPES[t]).itemsize
        lines = []
        for k, name in enumerate(names):
            kept = np.dtype(TYPES[self.kinds[name.rstrip("0123456789")]]).name
            value = f"S.param({at} + np.uint64({k * size}), np.{TYPES[t].__name__})"
            lines.append(f"R['{name}'].view(np.{kept})[I] = {value}")
        return lines

    def _atom(self, parts, o, i):
        assert parts == ["atom", "add", "release", "gpu", "u32"]
        base, offset = self.addr(o[1])
        at = f"{self.val(base, 'u64')} + np.uint64({offset})"
        return [f"R['{o[0]}'][I] = S.atom_add(I, {at}, {self.val(o[2], 'u32')})"]

    def _shfl(self, parts, o, i):
        assert parts[1] == "sync"
        value, *predicate = o[0].split("|")
        operands = ", ".join(self.val(x, "b32") for x in o[1:5])  # a, b, c, the mask of members
        lines = [f"_v, _p = S.shfl(I, '{parts[2]}', {operands}, {i})", f"R['{value}'][I] = _v"]
        return lines + [f"R['{name}'][I] = _p" for name in predicate]

    def _mma(self, parts, o, i):
        assert parts == ["mma", "sync", "aligned", "m16n8k8", "row", "col", "f32", "tf32", "tf32", "f32"]
        d, *operands = map(split_list, o)
        values = [", ".join(self.val(x, t) for x in xs) for xs, t in zip(operands, ("b32", "b32", "f32"), strict=True)]
        lines = [f"_d = S.mma(I, ({values[0]}), ({values[1]}), ({values[2]}), {i})"]
        return lines + [self.dst(x, "f32", f"_d[{k}]") for k, x in enumerate(d)]

    def regbytes(self, name):
        return {"b16": 2, "b32": 4, "f32": 4, "b64": 8}[self.kinds[name.rstrip("0123456789")]]


def _lanes(index):
    """index(g, t, register) for each lane and register, with g = lane // 4 and t = lane % 4."""
    return np.array([index(np.arange(32) // 4, np.arange(32) % 4, k) for k in range(4)]).T


# mma.m16n8k8 on tf32 as the PTX manual has it: where in a column-major matrix each lane's registers lie.
A_LAYOUT = _lanes(lambda g, t, k: g + 8 * (k % 2) + 16 * (t + 4 * (k // 2)))
B_LAYOUT = _lanes(lambda g, t, k: g + 8 * (t + 4 * k))[:, :2]
C_LAYOUT = _lanes(lambda g, t, k: g + 8 * (k // 2) + 16 * (2 * t + k % 2))


class Launch:
    """A kernel over `grid` blocks of `block` threads, with `shared` bytes each and the bytes of its parameter.

    `workspace` is the address of a cooperative launch's zeros. `policy` says who goes first: "all" threads together, or
    the "block" or "warp" that is "-first", "-last" or "-random". `truncate`: a tensor core cuts off what its sum has no
    bits for. `count` fills stats["warp_instructions"].
    """

    def __init__(
        self,
        program,
        memory,
        grid,
        block,
        shared,
        params,
        *,
        workspace=0,
        policy="all",
        check=True,
        seed=0,
        truncate=True,
        count=False,
    ):
        self.P, self.M = program, memory
        self.grid, self.block, n = grid, block, grid * block
        self.n = n
        self.truncate = truncate
        self.tid = np.tile(np.arange(block, dtype=np.uint32), grid)
        self.cta = np.repeat(np.arange(grid, dtype=np.uint32), block)
        self.params = np.frombuffer(params, np.uint8)
        assert len(self.params) == program.param_size, (len(self.params), program.param_size)
        self.pc = np.zeros(n, np.int64)
        self.state = np.zeros(n, np.int8)  # 0 runs, 1 at a barrier, 2 yields, 3 done
        self.envreg1, self.envreg2 = workspace >> 32, workspace & 0xFFFFFFFF
        self.shared_bytes = shared
        self.sh = np.full(grid * shared // 4 + 4, 0xFFFFFFFF, np.uint32)
        self.sh_init = np.zeros(self.sh.size, bool)
        self.check, self.policy, self.count = check, policy, count
        self.rng = np.random.default_rng(seed)
        self.epoch = np.ones(grid, np.int64)  # of a block: barriers passed
        self.clock = np.zeros((grid, grid), np.int64)  # clock[b, c]: what b knows of c's epochs
        self.pending = np.zeros((grid, grid), np.int64)
        self.released = {}  # address -> clock
        if check:
            self.sh_w = (np.full(self.sh.size, -1, np.int64), np.zeros(self.sh.size, np.int64))
            self.sh_r = (
                np.full(self.sh.size, -1, np.int64),
                np.zeros(self.sh.size, np.int64),
                np.zeros(self.sh.size, bool),
            )
            m = memory.u8.size // 2
            self.gl_w = (np.full(m, -1, np.int32), np.zeros(m, np.int32))
            self.gl_r = (np.full(m, -1, np.int32), np.zeros(m, np.int32), np.zeros(m, bool))
        size = {"pred": bool, "b16": np.uint16, "b32": np.uint32, "f32": np.uint32, "b64": np.uint64}
        kinds = program.kinds

        class Registers(dict):
            def __missing__(me, key):
                made = np.zeros(n, size[kinds[key.rstrip("0123456789")]])
                me[key] = made
                return made

        self.R = Registers()
        self.stats = {
            "mma": 0,
            "low_bits": 0,  # operands of mma with more bits than a tensor core reads
            "uninitialised": 0,
            "warp_instructions": 0,
            "loads": {},
            "sectors": 0,
            "ideal_sectors": 0,
            "bank_waves": 0,
            "bank_ideal": 0,
        }
        self.order_seen = 0

    def fault(self, what):
        raise Fault(f"{what} [{self.P.name[-40:]}]")

    # --- instruction helpers
    @staticmethod
    def fma(a, b, c):
        """a b + c with one rounding, but for float64's own, which is the wider by 29 bits."""
        return (np.asarray(a).astype(np.float64) * np.asarray(b).astype(np.float64) + c).astype(np.float32)

    @staticmethod
    def div(a, b):
        a, b = np.asarray(a), np.asarray(b)
        if (b == 0).any():
            raise Fault("division by zero")
        if a.dtype.kind == "u":
            return a // b
        q = np.abs(a) // np.abs(b)
        return np.where((a < 0) ^ (b < 0), -q, q).astype(a.dtype)

    @staticmethod
    def tf32(v):
        bits = np.ascontiguousarray(v).view(np.uint32)
        out = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
        nan = np.isnan(v)
        return np.where(nan, np.uint32(0x7FFFE000), np.where(special, bits, out))

    @staticmethod
    def bf16(v):
        bits = np.ascontiguousarray(v).view(np.uint32)
        out = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(v), np.uint32(0x7FFF), out).astype(np.uint16)

    def param(self, at, d):
        at = int(np.unique(at)[0]) if np.ndim(at) and np.unique(at).size == 1 else at
        size = np.dtype(d).itemsize
        if np.ndim(at):
            idx = np.asarray(at).astype(np.int64)
            assert (idx % size == 0).all()
            assert (idx + size <= self.params.size).all()
            return np.ascontiguousarray(self.params[: self.params.size // size * size]).view(d)[idx // size]
        assert at % size == 0
        assert at + size <= self.params.size
        return np.frombuffer(self.params[at : at + size].tobytes(), d)[0]

    def ids(self, I):
        return np.arange(self.n) if isinstance(I, slice) else I

    def whole_warps(self, I, at):
        ids = self.ids(I)
        if ids.size % 32 or not (ids.reshape(-1, 32) == (ids.reshape(-1, 32)[:, :1] // 32 * 32 + np.arange(32))).all():
            self.fault(f"divergent warp at instruction {at}: {self.P.code[at][2]}")
        return ids

    def shfl(self, I, mode, a, b, c, mask, at):
        self.whole_warps(I, at)
        if not (np.asarray(mask) == 0xFFFFFFFF).all():
            self.fault("shfl mask")
        a = np.broadcast_to(a, (self.ids(I).size,)).reshape(-1, 32)
        b = np.broadcast_to(np.asarray(b), (a.size,)).reshape(-1, 32)
        c = np.broadcast_to(np.asarray(c), (a.size,)).reshape(-1, 32)
        lane = np.arange(32, dtype=np.uint32)[None]
        bval, cval, seg = b & 31, c & 31, (c >> 8) & 31
        max_lane = (lane & seg) | (cval & ~seg)
        min_lane = lane & seg
        if mode == "bfly":
            j, p = lane ^ bval, None
            p = j <= max_lane
        else:
            j = min_lane | (bval & ~seg)
            p = j <= max_lane
        j = np.where(p, j, lane)
        return np.take_along_axis(a, j.astype(np.int64), 1).reshape(-1), p.reshape(-1)

    def mma(self, I, a, b, c, at):
        ids = self.whole_warps(I, at)
        w = ids.size // 32
        self.stats["mma"] += w

        def full(v):
            return np.broadcast_to(np.asarray(v), (ids.size,))

        A = np.zeros((w, 128), np.float32)
        B = np.zeros((w, 64), np.float32)
        C = np.zeros((w, 128), np.float32)
        low = 0
        for k in range(4):
            bits = full(a[k])
            low += int((bits & np.uint32(0x1FFF)).astype(bool).sum())
            A[:, A_LAYOUT[:, k]] = (bits & np.uint32(0xFFFFE000)).view(np.float32).reshape(w, 32)
            C[:, C_LAYOUT[:, k]] = full(c[k]).reshape(w, 32)
        for k in range(2):
            bits = full(b[k])
            low += int((bits & np.uint32(0x1FFF)).astype(bool).sum())
            B[:, B_LAYOUT[:, k]] = (bits & np.uint32(0xFFFFE000)).view(np.float32).reshape(w, 32)
        self.stats["low_bits"] += low
        # column-major (m + 16 k), (n + 8 k), (m + 16 n)
        Am, Bm = A.reshape(w, 8, 16).astype(np.float64), B.reshape(w, 8, 8).astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            D = np.matmul(Bm.transpose(0, 2, 1), Am) + C.reshape(w, 8, 16)  # (n, m)
            out = D.astype(np.float32)
            if self.truncate:  # towards zero
                over = np.isfinite(D) & (np.abs(out.astype(np.float64)) > np.abs(D))
                out = np.where(over, np.nextafter(out, np.float32(0)), out)
        out = out.reshape(w, 128)
        return [out[:, C_LAYOUT[:, k]].reshape(-1) for k in range(4)]

    # --- memory
    def ordered(self, ids, tid, epoch):
        """Whether an access by thread tid in its block's epoch happens before one by ids now."""
        mine, theirs = ids // self.block, np.maximum(tid, 0) // self.block
        same = mine == theirs
        return (
            (tid < 0)
            | (tid == ids)
            | (same & (epoch < self.epoch[mine]))
            | (~same & (epoch <= self.clock[mine, theirs]))
        )

    def race(self, ids, slots, tables, write, where):
        (wt, we), (rt, re_, rm) = tables
        ids2 = np.repeat(ids[:, None], slots.shape[1], 1).ravel()
        s = slots.ravel()
        if not self.ordered(ids2, wt[s].astype(np.int64), we[s].astype(np.int64)).all():
            self.fault(f"race: {'write' if write else 'read'} after unordered write at {where} {self.P.code[where]}")
        if write:
            bad = ~(self.ordered(ids2, rt[s].astype(np.int64), re_[s].astype(np.int64)))
            stale = rm[s] & ~self.read_old(ids2, re_[s].astype(np.int64), rt[s].astype(np.int64))
            if bad.any() or stale.any():
                self.fault(f"race: write after unordered read at {where} {self.P.code[where]}")
            u, counts = np.unique(s, return_counts=True)
            if (counts > 1).any():
                self.fault(f"race: two threads write one place at {where}")
            wt[s], we[s] = ids2, self.epoch[ids2 // self.block]
            rm[s] = False
            rt[s] = -1
        else:
            unordered = ~self.ordered(ids2, rt[s].astype(np.int64), re_[s].astype(np.int64))
            rm[s] = rm[s] & (re_[s] == self.epoch[ids2 // self.block]) | unordered
            rt[s], re_[s] = ids2, self.epoch[ids2 // self.block]
            u, counts = np.unique(s, return_counts=True)
            rm[u[counts > 1]] = True

    def read_old(self, ids, epoch, tid):
        mine, theirs = ids // self.block, np.maximum(tid, 0) // self.block
        same = mine == theirs
        return (same & (epoch < self.epoch[mine])) | (~same & (epoch <= self.clock[mine, theirs]))

    def locate_global(self, ids, at, width, vec, where, write):
        at = np.broadcast_to(np.asarray(at, np.uint64), ids.shape)
        off = at.astype(np.int64) - BASE
        total = width * vec
        if (off % total).any():
            self.fault(
                f"misaligned address {hex(int(at[np.nonzero(off % total)[0][0]]))} at {where} {self.P.code[where]}"
            )
        if (off < 0).any() or (off + total > self.M.u8.size).any():
            self.fault(f"wild address {hex(int(at[0]))} at {where} {self.P.code[where]}")
        if not (self.M.valid[off].all() and self.M.valid[off + total - 1].all()):
            self.fault(f"out of bounds at {where} {self.P.code[where]}")
        if write and self.M.readonly[off].any():
            self.fault(f"write to a read-only tensor at {where}")
        # coalescing: 32-byte sectors per warp request, against the fewest possible
        key = (ids // 32).astype(np.int64) << 40
        sectors = np.unique(np.concatenate([key + off // 32, key + (off + total - 1) // 32]))
        self.stats["sectors"] += sectors.size
        self.stats["ideal_sectors"] += ids.size * total / 32
        k = f"{'st' if write else 'ld'}.global {total}B"
        self.stats["loads"][k] = self.stats["loads"].get(k, 0) + ids.size
        return off

    def load_global(self, I, at, width, vec, where):
        ids = self.ids(I)
        off = self.locate_global(ids, at, width, vec, where, False)
        view = self.M.views[width]
        cells = off[:, None] // width + np.arange(vec)
        if self.check:
            if not self.M.init[off].all() or not self.M.init[off + width * vec - 1].all():
                bad = ~(self.M.init[off] & self.M.init[off + width * vec - 1])
                self.stats["uninitialised"] += int(bad.sum())
            self.race(ids, off[:, None] // 2 + np.arange(width * vec // 2), (self.gl_w, self.gl_r), False, where)
        v = view[cells]
        return [v[:, k] for k in range(vec)]

    def store_global(self, I, at, width, vec, values, where):
        ids = self.ids(I)
        off = self.locate_global(ids, at, width, vec, where, True)
        if self.check:
            self.race(ids, off[:, None] // 2 + np.arange(width * vec // 2), (self.gl_w, self.gl_r), True, where)
        view = self.M.views[width]
        for k in range(vec):
            view[off // width + k] = values[k]
        for k in range(width * vec):
            self.M.init[off + k] = True

    def locate_shared(self, ids, at, width, vec, where):
        assert width == 4
        at = np.broadcast_to(np.asarray(at, np.uint32), ids.shape).astype(np.int64)
        total = 4 * vec
        if (at % total).any():
            self.fault(f"misaligned shared address at {where}")
        if (at + total > self.shared_bytes).any():
            self.fault(f"shared address {int(at.max())} beyond {self.shared_bytes} at {where}")
        # bank conflicts: waves per warp = most different words in one bank
        words = at // 4
        if vec == 1:
            key = np.unique((ids // 32) * (1 << 24) + words)
            warp, word = key >> 24, key & ((1 << 24) - 1)
            count = np.unique(warp * 64 + word % 32, return_counts=True)
            waves = np.zeros(self.n // 32 + 1, int)
            np.maximum.at(waves, count[0] // 64, count[1])
            self.stats["bank_waves"] += int(waves.sum())
            self.stats["bank_ideal"] += int((waves > 0).sum())
        return (ids // self.block) * (self.shared_bytes // 4) + words

    def load_shared(self, I, at, width, vec, where):
        ids = self.ids(I)
        cell = self.locate_shared(ids, at, width, vec, where)[:, None] + np.arange(vec)
        if self.check:
            if not self.sh_init[cell].all():
                self.stats["uninitialised"] += 1
            self.race(ids, cell, (self.sh_w, self.sh_r), False, where)
        v = self.sh[cell]
        return [v[:, k] for k in range(vec)]

    def store_shared(self, I, at, width, vec, values, where):
        ids = self.ids(I)
        cell = self.locate_shared(ids, at, width, vec, where)
        if self.check:
            self.race(ids, cell[:, None] + np.arange(vec), (self.sh_w, self.sh_r), True, where)
        for k in range(vec):
            self.sh[cell + k] = values[k]
            self.sh_init[cell + k] = True

    def atom_add(self, I, at, value):
        ids = self.ids(I)
        at = np.broadcast_to(np.asarray(at, np.uint64), ids.shape)
        value = np.broadcast_to(np.asarray(value, np.uint32), ids.shape)
        out = np.zeros(ids.size, np.uint32)
        for k, (i, p, v) in enumerate(zip(ids, at, value, strict=True)):
            off = int(p) - BASE
            assert self.M.valid[off]
            assert off % 4 == 0
            old = self.M.views[4][off // 4]
            out[k] = old
            self.M.views[4][off // 4] = np.uint32((int(old) + int(v)) & 0xFFFFFFFF)
            b = i // self.block
            own = self.clock[b].copy()
            own[b] = self.epoch[b] - 1  # what the block's barrier has put behind it
            known = self.released.setdefault(int(p), np.zeros(self.grid, np.int64))
            np.maximum(known, own, out=known)
        return out

    def acquire(self, I, at):
        ids = self.ids(I)
        at = np.broadcast_to(np.asarray(at, np.uint64), ids.shape)
        off = at.astype(np.int64) - BASE
        for i, p in zip(ids, at, strict=True):
            if int(p) in self.released:
                b = i // self.block
                np.maximum(self.pending[b], self.released[int(p)], out=self.pending[b])
        self.state[I] = 2  # spins: others first
        return self.M.views[4][off // 4]

    def barrier(self, I, after, at):
        ids = self.ids(I)
        self.state[ids] = 1
        self.pc[ids] = after
        for b in np.unique(ids // self.block):
            span = slice(b * self.block, (b + 1) * self.block)
            if (self.state[span] == 1).all():
                if not (self.pc[span] == self.pc[span][0]).all():
                    self.fault("threads of a block meet at different barriers")
                self.state[span] = 0
                self.epoch[b] += 1
                np.maximum(self.clock[b], self.pending[b], out=self.clock[b])

    def exit(self, I):
        self.state[I] = 3

    # --- schedule
    def run(self):
        """Until every thread has ended. Raises Fault."""
        P, pc, state = self.P, self.pc, self.state
        old = np.seterr(all="ignore")
        try:
            while True:
                ready = state == 0
                if not ready.any():
                    if (state == 3).all():
                        return
                    if (state == 2).any():
                        state[state == 2] = 0
                        self.order_seen += 1
                        if self.order_seen > 100000:
                            self.fault("spins for ever")
                        continue
                    self.fault(f"deadlock: {np.unique(pc[state == 1])}, {(state == 3).sum()} threads done")
                if self.policy != "all":
                    ids = np.nonzero(ready)[0]
                    unit = {"block": self.block, "warp": 32}[self.policy.split("-")[0]]
                    order = self.policy.split("-")[1]
                    units = np.unique(ids // unit)
                    pick = units[0] if order == "first" else units[-1] if order == "last" else self.rng.choice(units)
                    ready = ready & (np.arange(self.n) // unit == pick)
                at = int(pc[ready].min())
                I = np.nonzero(ready & (pc == at))[0]
                if I.size == self.n:
                    I = slice(None)
                if self.count:
                    ids = self.ids(I)
                    k = np.unique(ids // 32).size
                    self.stats["warp_instructions"] += k * P.length[at]
                P.blocks[at](self, self.R, I)
        finally:
            np.seterr(**old)


class Module:
    """The kernels of a PTX text: "Tiles float", "Split Half", ..."""

    def __init__(self, text):
        self.kernels = {}
        for name, (regs, code, labels, size) in parse(text).items():
            element = "Half" if "4HalfE" in name else "BFloat16" if "8BFloat16E" in name else "float"
            kernel = ("Split" if "5Split" in name else "Tiles") + f" {element}"
            self.kernels[kernel] = Program(name, regs, code, labels, size)

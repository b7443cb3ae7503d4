"""Hostile folders of cubins: planted by others, in circles, of the wrong kind, damaged, full, and killed writers.

Whatever the folder is like, `find` returns the bytes that NVRTC gives (or raises a RuntimeError), soon, writes nothing
elsewhere and nothing that others may write to.  As root the victim is now root and now a user of its own, and
another user plants; as anybody else what needs two users is left out.  Few kernels are compiled, each once.

    python tests/attacks/folders.py SEED CASE      # one case again; CASE as in a finding
    python tests/attacks/folders.py writers SEED COUNT
"""

import hashlib
import os
import pickle
import pwd
import random
import resource
import select
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache as once
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from attacks.outcome import Outcome

from cupyattn.cuda.making import cache, compiler, source

FACTOR = "#pragma once\nnamespace test {\nconstexpr float kFactor = 2.0f;\n}\n"
SCALE = """#include "factor.cuh"
namespace test {
template <int kPower>
__global__ void scale(float* x) {
    for (int i = 0; i < kPower; ++i) x[threadIdx.x] *= kFactor;
}
}
"""
TARGET = "sm_90a"
KERNELS = 4
VICTIM, ATTACKER = 54321, 12345
"""Users that no machine has."""
WAIT = 30.0
"""Seconds after which a child hangs."""
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@once
def compiled():
    """The kernels' cubins, from NVRTC; the last one is what attackers plant."""
    with tempfile.TemporaryDirectory() as folder:
        _write_sources(Path(folder))
        text = source.join("scale.cu", Path(folder))
    return [compiler.compile_cubin(text, _expression(power), TARGET) for power in range(KERNELS + 1)]


def _expression(power):
    return f"test::scale<{power}>"


def _write_sources(folder):
    folder.mkdir(exist_ok=True)
    (folder / "factor.cuh").write_text(FACTOR)
    (folder / "scale.cu").write_text(SCALE)


def _compile_again(text, expression, target):
    return compiled()[int(expression.removeprefix("test::scale<").removesuffix(">")) % KERNELS]


def _find(sources, power=0):
    """`find` without NVRTC and without what this process remembers."""
    cache._in_memory.clear()
    return cache.find("scale.cu", _expression(power), TARGET, sources=sources)


# ---------------------------------------------------------------------------------------------------
# Children
# ---------------------------------------------------------------------------------------------------


def _fork(function):
    """(process, end of a pipe from which its result comes, pickled)."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(here)
            compiler.compile_cubin = _compile_again
            with open(there, "wb") as pipe:
                pickle.dump(function(), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(there)
    return child, here


def _result(child, here, wait=WAIT):
    """What a child returned; a string if it hung or died."""
    end, text = time.monotonic() + wait, b""
    with open(here, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            if not (more := pipe.read(2**16)):
                break
            text += more
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"hung for {wait:.0f} s"
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return pickle.loads(text) if status == 0 else f"died with {status}"


# ---------------------------------------------------------------------------------------------------
# Places
# ---------------------------------------------------------------------------------------------------


class Place:
    """A temporary folder with sources, a cache that holds one cubin, and things beside it that must stay as they are.

    `prepare` steps are for the parent, which may do all; `inside` is what the child does before it looks.
    """

    def __init__(self, root, rng, user):
        self.root, self.rng, self.user = root, rng, user
        self.chosen, self.sources, self.beside = root / "cache", root / "sources", root / "beside"
        self.folder = self.chosen / _version()
        _write_sources(self.sources)
        root.chmod(0o755)
        self.truth, self.evil = compiled()[0], compiled()[KERNELS]
        text = source.join("scale.cu", self.sources)
        self.key = cache.key_of(text, _expression(0), TARGET)
        self.path = self.folder / self.name_of(self.truth.image)
        self.inside, self.environment, self.is_unusable, self.changes = [], {}, False, set()
        for folder in (self.chosen, self.folder, self.beside):
            folder.mkdir(mode=0o700)
        self.put(self.path, self.truth.image, 0o644)
        self.put(self.beside / "thesis.part", b"years of work", 0o600)
        for each in (self.chosen, self.folder, self.beside):
            self.give(each, user)

    def name_of(self, image):
        return f"{self.key}-nvrtc{self.truth.nvrtc}-{hashlib.sha256(image).hexdigest()[:32]}.cubin"

    def put(self, path, content, mode=0o600, user=None):
        path.write_bytes(content)
        path.chmod(mode)
        self.give(path, self.user if user is None else user)
        return path

    def plant(self, folder=None, user=None, mode=0o644):
        """Another cubin under this kernel's name, with its own digest; the right one is gone."""
        self.path.unlink(missing_ok=True)
        return self.put((folder or self.folder) / self.name_of(self.evil.image), self.evil.image, mode, user)

    def give(self, path, user):
        if IS_ROOT:
            os.chown(path, user, -1, follow_symlinks=False)

    def link(self, path, to, user=None):
        path.symlink_to(to)
        self.give(path, self.user if user is None else user)

    def of_attacker(self, name, mode=0o755):
        folder = self.root / name
        folder.mkdir()
        folder.chmod(mode)
        self.give(folder, ATTACKER)
        return folder

    def move_cache(self, to):
        """The cache elsewhere, and where it was the way there."""
        self.chosen.rename(to)
        self.folder = to / _version()
        self.path = self.folder / self.path.name


def _version():
    import cupyattn

    return cupyattn.__version__


def _tree(root):
    """What lies below a folder: kind, mode, owner and content, by name."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            content = None
            if stat.S_ISREG(status.st_mode):
                content = status.st_size if status.st_size > 2**20 else Path(path).read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            found[path] = status.st_mode, status.st_uid, content
    return found


# ---------------------------------------------------------------------------------------------------
# What is wrong with them
# ---------------------------------------------------------------------------------------------------


def _planted(user=None, mode=0o644):
    return lambda place: place.plant(user=user, mode=mode if isinstance(mode, int) else place.rng.choice(mode))


def _open(which, modes):
    """The folder of cubins, or the one above, as others may write to it."""

    def change(place):
        place.plant()
        getattr(place, which).chmod(place.rng.choice(modes))
        place.is_unusable = True

    return change


def _of_another(which):
    def change(place):
        place.plant(user=ATTACKER)
        getattr(place, which).chmod(0o755)
        place.give(getattr(place, which), ATTACKER)
        place.is_unusable = True

    return change


def _to_anothers_file(link):
    def change(place):
        there = place.plant(place.of_attacker("there"), ATTACKER)
        link(place.folder / there.name, there)

    return change


def _link_to_anothers_folder(place):
    there = place.of_attacker("there")
    place.plant(place.of_attacker(f"there/{_version()}"), ATTACKER)
    shutil.rmtree(place.chosen)
    place.link(place.chosen, there)
    place.is_unusable = True


def _through_an_open_folder(place):
    """Where a link on the way could be replaced at any time."""
    (place.root / "open").mkdir()
    place.move_cache(place.root / "real")
    place.link(place.root / "open" / "way", place.folder.parent)
    place.link(place.chosen, place.root / "open" / "way")
    (place.root / "open").chmod(0o777)
    place.is_unusable = True


def _changed_after_it_was_looked_at(place):
    """To a folder where this kernel's name leads to another cubin of the victim's, whom `_read` believes."""
    _through_an_open_folder(place)
    place.is_unusable = False
    planted, trap, way = place.plant(), place.root / "trap" / _version(), place.root / "open" / "way"
    trap.mkdir(parents=True)
    place.link(trap / planted.name, planted.rename(place.folder / "another.cubin"))

    def change(folder, real=cache.is_ours):
        found = real(folder)
        way.unlink()
        way.symlink_to(trap.parent)
        return found

    place.inside.append(lambda: setattr(cache, "is_ours", change))
    place.changes.add(str(way))


def _anothers_link_where_all_may_write(place):
    """In a sticky folder such as /tmp, a link that is another's to change, to a folder of the victim's.

    Linux follows no such links where fs.protected_symlinks is 1.
    """
    (place.root / "tmp").mkdir()
    (place.root / "tmp").chmod(0o1777)
    place.link(place.root / "tmp" / "cache", place.beside, ATTACKER)
    place.environment["CUPYATTN_CACHE_DIR"] = str(place.root / "tmp" / "cache")
    place.is_unusable = True


def _in_a_sticky_folder_of_another(place):
    there = place.of_attacker("there", 0o1777)
    place.move_cache(there / "cache")
    place.link(place.chosen, place.folder.parent)
    place.plant()
    place.is_unusable = True


def _instead(which, make):
    """Something else in the place of the folder or of the file."""

    def change(place):
        path = getattr(place, which)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(place, path)

    return change


def _circle(place, path):
    place.link(path, place.root / "other")
    place.link(place.root / "other", path)


def _socket(place, path):
    with socket.socket(socket.AF_UNIX) as made:
        before = Path.cwd()
        os.chdir(path.parent)  # a socket's whole name may have no more than 108 bytes
        try:
            made.bind(path.name)
        finally:
            os.chdir(before)


def _directory(place, path):
    path.mkdir()
    if place.rng.random() < 0.5:
        (path / "full").touch()


def _device(place, path):
    place.link(path, place.rng.choice(["/dev/zero", "/dev/full", "/dev/tty", "/dev/null", "/dev/stdin"]))


def _odd_parts(place, path):
    place.link(place.folder / "1-a.part", place.beside / "thesis.part")
    place.link(place.folder / "1-b.part", place.beside)
    place.link(place.folder / "1-c.part", place.folder / "1-c.part")
    os.mkfifo(place.folder / "1-d.part")
    (place.folder / "1-e.part").mkdir()
    _socket(place, place.folder / "1-f.part")
    place.put(place.folder / "1-g.part", b"", 0o000)


def _odd_names(place, path):
    for name in (f"{place.key}-.cubin", f"{place.key}-nvrtc-.cubin", f"{place.key}-nvrtc13.5-\n.cubin",
                 f"{place.key}-nvrtc{'9' * 100}.0-{'0' * 32}.cubin", os.fsdecode(b"\xff.part")):  # fmt: skip
        place.put(place.folder / name, place.evil.image)


def _truncated(place):
    place.path.write_bytes(place.truth.image[: place.rng.randrange(len(place.truth.image))])


def _bits_flipped(place):
    image = bytearray(place.truth.image)
    for where in place.rng.sample(range(len(image)), place.rng.choice([1, 1, 2, 100])):
        image[where] ^= 1 << place.rng.randrange(8)
    place.path.write_bytes(image)


def _no_cubin_with_its_digest(place, path):
    """Half of one, or one whose tables lead anywhere, and the name fits."""
    image = bytearray(place.truth.image[: place.rng.choice([0, 1, 63, 64, 65, len(place.truth.image) // 2])])
    image[6:64] = place.rng.randbytes(len(image[6:64]))
    place.put(place.folder / place.name_of(bytes(image)), bytes(image), 0o644)


def _terabyte(place):
    os.truncate(place.path, 2**40)
    place.inside.append(lambda: resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36)))


def _file_gone_before_it_is_opened(place):
    def gone(path, *trust, real=cache._read):
        path.unlink(missing_ok=True)
        return real(path, *trust)

    place.inside.append(lambda: setattr(cache, "_read", gone))


def _folder_gone_after_it_was_looked_at(place):
    def gone(folder, real=cache.is_ours):
        found = real(folder)
        shutil.rmtree(folder, ignore_errors=True)
        return found

    place.inside.append(lambda: setattr(cache, "is_ours", gone))


def _full_disk(place, path):
    limit = place.rng.choice([0, 1, 1000, len(place.truth.image) - 1])
    place.inside.append(lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
    place.inside.append(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))


def _no_more_handles(place):
    def limited():
        taken = len(os.listdir("/proc/self/fd")) - 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 1, taken + 1))  # enough for the sources, one by one

    place.inside.append(limited)


def _mode(which, *modes):
    return lambda place: getattr(place, which).chmod(place.rng.choice(modes))


def _umask(mask):
    def change(place):
        place.environment["CUPYATTN_CACHE_DIR"] = str(place.beside / "a" / "b")
        place.folder = place.beside / "a"
        place.inside.append(lambda: os.umask(mask))

    return change


def _homeless(place):
    def unknown(_):
        raise KeyError("no such user")

    place.inside.append(lambda: setattr(pwd, "getpwuid", unknown))
    for name in ("HOME", "CUPYATTN_CACHE_DIR", "XDG_CACHE_HOME"):
        place.inside.append(lambda name=name: os.environ.pop(name, None))


def _working_folder_gone(place):
    """A relative folder leads from there."""

    def gone():
        os.chdir(tempfile.mkdtemp(dir=place.beside))
        os.rmdir(Path.cwd())

    place.environment["CUPYATTN_CACHE_DIR"] = "cache"
    place.inside.append(gone)


def _chosen(text):
    return lambda place: place.environment.update(CUPYATTN_CACHE_DIR=text)


SCENARIOS = {
    "nothing wrong": lambda place: None,
    "a folder that others may write to": _open("folder", [0o770, 0o707, 0o777, 0o1777, 0o720, 0o702]),
    "a parent that others may write to": _open("chosen", [0o770, 0o707, 0o777, 0o720]),
    "a file that others may write to": _planted(mode=[0o664, 0o646, 0o666, 0o620, 0o602]),
    "a link through an open folder": _through_an_open_folder,
    "a link that is changed after it was looked at": _changed_after_it_was_looked_at,
    "links in a circle": _instead("chosen", _circle),
    "a file that is a link to itself": _instead("path", lambda place, path: place.link(path, path)),
    "a folder that is a file": _instead("chosen", lambda place, path: place.put(path, b"")),
    "a folder that leads nowhere": _instead("chosen", lambda place, path: place.link(path, place.beside / "nothing")),
    "a file that leads nowhere": _instead("path", lambda place, path: place.link(path, place.beside / "nothing")),
    "parts of every kind": _instead("path", _odd_parts),
    "names of no cubin": _instead("path", _odd_names),
    "a pipe for a cubin": _instead("path", lambda place, path: os.mkfifo(path)),
    "a directory for a cubin": _instead("path", _directory),
    "a socket for a cubin": _instead("path", _socket),
    "a device for a cubin": _instead("path", _device),
    "truncated": _truncated,
    "bits flipped": _bits_flipped,
    "no cubin, with its digest": _instead("path", _no_cubin_with_its_digest),
    "a file of a terabyte": _terabyte,
    "a file gone before it is opened": _file_gone_before_it_is_opened,
    "a folder gone after it was looked at": _folder_gone_after_it_was_looked_at,
    "a full disk": _instead("path", _full_disk),
    "no more handles": _no_more_handles,
    "a folder without permissions": _mode("folder", 0o000, 0o100, 0o200, 0o300, 0o400, 0o500, 0o600),
    "a parent without permissions": _mode("chosen", 0o000, 0o200, 0o400, 0o600),
    "a file without permissions": _mode("path", 0o000, 0o200),
    "umask 0": _umask(0),
    "umask 777": _umask(0o777),
    "no home": _homeless,
    "home of nobody": _chosen("~nobodyhasthisname/cache"),
    "a relative folder and no working folder": _working_folder_gone,
    "a name too long": _chosen("/tmp/" + "x" * 300),
}
OF_TWO_USERS = {
    "another's folder": _of_another("folder"),
    "another's parent": _of_another("chosen"),
    "another's file": _planted(user=ATTACKER),
    "a link to another's file": _to_anothers_file(lambda path, there: path.symlink_to(there)),
    "a hard link to another's file": _to_anothers_file(lambda path, there: os.link(there, path)),
    "a link to another's folder": _link_to_anothers_folder,
    "another's link where all may write": _anothers_link_where_all_may_write,
    "another's sticky folder": _in_a_sticky_folder_of_another,
}


# ---------------------------------------------------------------------------------------------------
# One case
# ---------------------------------------------------------------------------------------------------


def _looking(place):
    """What the child does: look twice, as the victim."""

    def look():
        os.environ.update({"CUPYATTN_CACHE_DIR": str(place.chosen), **place.environment})
        cache.PREBUILT = place.root / "prebuilt"
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        if place.user != os.geteuid():
            os.setgroups([])
            os.setgid(place.user)
            os.setuid(place.user)
        for step in place.inside:
            step()
        found = []
        for _ in range(2):
            try:
                entry = _find(place.sources)
                found.append((entry.image, entry.path))
            except BaseException as error:
                found.append(error if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}")
        return found

    return look


def _case(seed, number):
    """The name of a case and what is wrong with what came of it, or nothing."""
    rng = random.Random(f"{seed}-{number}")
    scenarios = {**SCENARIOS, **(OF_TWO_USERS if IS_ROOT else {})}
    turn, index = divmod(number, len(scenarios))
    name, change = list(scenarios.items())[(index + seed) % len(scenarios)]
    users = (0, VICTIM) if IS_ROOT else (os.geteuid(),)
    user = users[(turn + index) % len(users)]
    root = Path(tempfile.mkdtemp(prefix="cupyattn-attack-"))
    try:
        place = Place(root, rng, user)
        change(place)
        before = _tree(root)
        found = _result(*_fork(_looking(place)))
        wrong = dict.fromkeys(each.replace(str(root), "...") for each in _wrong(place, before, found))
        return f"{name}, as {'root' if user == 0 else 'a user'}", "; ".join(wrong)
    finally:
        for folder, _, _ in os.walk(root):
            Path(folder).chmod(0o700)
        shutil.rmtree(root, ignore_errors=True)


def _wrong(place, before, found):
    if isinstance(found, str):
        yield f"the process {found}"
        return
    for each in found:
        if isinstance(each, str):
            yield f"find raised {each}"
        elif not isinstance(each, RuntimeError):
            image, path = each
            if image != place.truth.image:
                yield "another's bytes were returned" if image == place.evil.image else "wrong bytes were returned"
            if path is not None and place.is_unusable:
                yield f"{path} was used, though others can put another in its place"
    after = _tree(place.root)
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) == after.get(path) or path in place.changes:
            continue
        if place.is_unusable or not Path(path).is_relative_to(place.folder):
            yield f"{path} was {'changed' if path in before and path in after else 'made' if path in after else 'lost'}"
        elif path in after and not stat.S_ISLNK(after[path][0]) and after[path][0] & cache.WRITABLE_BY_OTHERS:
            yield f"others may write to {path}"


# ---------------------------------------------------------------------------------------------------
# Killed writers
# ---------------------------------------------------------------------------------------------------


def _busy(root, seed, removes):
    """Finds kernels for ever, some of which it has removed before; ends with words about the first wrong one."""

    def work():
        os.environ["CUPYATTN_CACHE_DIR"] = str(root / "cache")
        cache.PREBUILT = root / "prebuilt"
        rng, count = random.Random(seed), 0
        end = time.monotonic() + WAIT
        while time.monotonic() < end and not (root / "stop").exists():
            power = rng.randrange(3 * KERNELS)
            if removes:
                for path in cache.user_folder().glob("*.cubin"):
                    if rng.random() < 0.5:
                        path.unlink(missing_ok=True)
            try:
                entry = _find(root / "sources", power)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            if entry.image != compiled()[power % KERNELS].image:
                return f"wrong bytes for kernel {power}"
            count += 1
        return count

    return work


def _killed_writers(seed, count):
    """What readers and the folder had to complain of, and how many kernels were read meanwhile."""
    rng, lost, reads = random.Random(f"{seed}-writers"), [], 0
    root = Path(tempfile.mkdtemp(prefix="cupyattn-attack-"))
    again = f"python tests/attacks/folders.py writers {seed} {count}"
    try:
        _write_sources(root / "sources")
        readers, writers = [_fork(_busy(root, f"{seed}-r{i}", False)) for i in range(2)], []
        for number in range(count):
            writers.append((*_fork(_busy(root, f"{seed}-{number}", True)), time.monotonic() + rng.uniform(0.0, 0.08)))
            while writers and (len(writers) > 2 or number == count - 1):
                child, here, end = writers.pop(0)
                time.sleep(max(0.0, end - time.monotonic()))
                os.kill(child, signal.SIGKILL)
                found = _result(child, here)
                if found != f"died with {-signal.SIGKILL}" and not isinstance(found, int):
                    lost.append(f"killed writers: a writer found {found}; {again}")
                for part in (root / "cache" / _version()).glob("*.part"):
                    offset = rng.choice([0.0, -1e6, 1e6, -time.time()])
                    with suppress(FileNotFoundError):
                        os.utime(part, (time.time() + offset,) * 2)
            if number % 20 == 19 or number == count - 1:
                (root / "stop").touch()
                for child, here in readers:
                    found = _result(child, here)
                    reads += found if isinstance(found, int) else 0
                    if not isinstance(found, int):
                        lost.append(f"killed writers: a reader found {found}; {again}")
                (root / "stop").unlink()
                readers = [_fork(_busy(root, f"{seed}-r{number}{i}", False)) for i in range(2 * (number < count - 1))]
        for path in (root / "cache").rglob("*.cubin"):
            path.unlink()
        found = _result(*_fork(lambda: _stored_after(root)))
        if found:
            lost.append(f"killed writers: {found}; {again}")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return reads, lost


def _stored_after(root):
    """What is wrong after one store when nobody else writes any more."""
    os.environ["CUPYATTN_CACHE_DIR"] = str(root / "cache")
    cache.PREBUILT = root / "prebuilt"
    entry = _find(root / "sources")
    if entry.path is None or entry.image != compiled()[0].image:
        return "the next store failed"
    left = [path.name for path in entry.path.parent.iterdir() if path != entry.path]
    return f"after the next store there were {', '.join(left)}" if left else ""


def attack(seed: int, cases: int) -> Outcome:
    """`cases` folders, each kind in turn, and as many writers that are killed."""
    if compiler.version() is None:
        return Outcome(0, [], "no NVRTC, no cubins")
    if not hasattr(os, "fork"):
        return Outcome(0, [], "no fork, no users")
    compiled()
    lost = []
    for number in range(cases):
        name, wrong = _case(seed, number)
        if wrong:
            lost.append(f"{name}: {wrong}; python tests/attacks/folders.py {seed} {number}")
    reads, found = _killed_writers(seed, cases)
    lost += found
    notes = f"{reads} reads beside {cases} killed writers; file systems that are mounted read-only were not tried"
    if not IS_ROOT:
        notes += f"; not root, so these were left out: {', '.join(OF_TWO_USERS)}"
    return Outcome(2 * cases, lost, notes)


if __name__ == "__main__":
    if sys.argv[1] == "writers":
        print(_killed_writers(int(sys.argv[2]), int(sys.argv[3])))
    else:
        compiled()
        print(*_case(int(sys.argv[1]), int(sys.argv[2])), sep=": ")

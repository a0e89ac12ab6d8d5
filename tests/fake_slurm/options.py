"""Command lines: which options sbatch, srun and salloc know, from where they are read, what they refuse.

An option's value stays text here; what it asks of the cluster is request.py's part."""

import re

from .formats import expand, BadHostlist, parse_megabytes, parse_moment, parse_signal, parse_time


class Refusal(Exception):
    """Words for stderr and an exit code; ends one command."""

    def __init__(self, code, *lines):
        super().__init__(code, *lines)
        self.code, self.lines = code, lines


# name, short letter or -, value (`=` needed, `?` may be, `.` none), commands (s=sbatch r=srun a=salloc)
TABLE = """
account A = sra|acctg-freq - = sra|array a = s|batch - = s|bb - = sra|bbf - = sra|bcast - ? r|begin b = sra
bell - . a|chdir D = sra|cluster - = sa|clusters M = sra|cluster-constraint - = s|comment - = sra|compress - ? r
constraint C = sra|container - = sra|contiguous - . sra|core-spec S = sra|cores-per-socket - = sra|cpu-bind - = r
cpu-freq - = sra|cpus-per-gpu - = sra|cpus-per-task c = sra|deadline - = sra|delay-boot - = sra|dependency d = sra
disable-status X . r|distribution m = sra|epilog - = r|error e = sr|exact - . r|exclude x = sra|exclusive - ? sra
export - = sr|export-file - = s|extra-node-info B = sra|get-user-env - ? sa|gid - = sra|gpu-bind - = sra
gpu-freq - = sra|gpus G = sra|gpus-per-node - = sra|gpus-per-socket - = sra|gpus-per-task - = sra|gres - = sra
gres-flags - = sra|help h . sra|het-group - = r|hint - = sra|hold H . sra|ignore-pbs - . s|immediate I ? ra
input i = sr|interactive - . r|job-name J = sra|jobid - = r|kill-command K ? a|kill-on-bad-exit K ? r
kill-on-invalid-dep - = s|label l . r|licenses L = sra|mail-type - = sra|mail-user - = sra|mcs-label - = sra
mem - = sra|mem-bind - = sra|mem-per-cpu - = sra|mem-per-gpu - = sra|mincpus - = sra|mpi - = r|msg-timeout - = r
multi-prog - . r|network - = sra|nice - ? sra|no-allocate Z . r|no-bell - . a|no-kill k ? sra|no-requeue - . s
no-shell - . a|nodefile F = sa|nodelist w = sra|nodes N = sra|ntasks n = sra|ntasks-per-core - = sra
ntasks-per-gpu - = sra|ntasks-per-node - = sra|ntasks-per-socket - = sra|open-mode - = sr|output o = sr
overcommit O . sra|overlap - . r|oversubscribe s . sra|parsable - . s|partition p = sra|power - = sra|prefer - = sra
preserve-env E . r|priority - = sra|profile - = sra|prolog - = r|propagate - ? sr|pty - ? r|qos q = sra
quiet Q . sra|quit-on-interrupt - . r|reboot - . sra|relative r = r|requeue - . s|reservation - = sra
resv-ports - ? r|send-libs - ? r|signal - = sra|slurmd-debug - = r|sockets-per-node - = sra|spread-job - . sra
switches - = sra|task-epilog - = r|task-prolog - = r|test-only - . sr|thread-spec - = sra|threads T = r
threads-per-core - = sra|time t = sra|time-min - = sra|tmp - = sra|uid - = sra|unbuffered u . r|usage - . sra
use-min-nodes - . sra|verbose v . sra|version V . sra|wait-all-nodes - = sa|wait W . s|wait W = r|wckey - = sra
wrap - = s|x11 - ? ra
""".replace("\n", "|").strip("|")

LETTER = {"sbatch": "s", "srun": "r", "salloc": "a"}


def known_options(tool):
    """{name: value kind}, {letter: name}"""
    kinds, letters = {}, {}
    for entry in TABLE.split("|"):
        name, letter, kind, tools = entry.split()
        if LETTER[tool] in tools:
            kinds[name] = kind
            letters[letter] = name
    return kinds, letters


KNOWN = {tool: known_options(tool) for tool in LETTER}

# Variables that stand for options. SBATCH_* override #SBATCH lines; the command line overrides both.
ENVIRONMENT = {
    "sbatch": {"SBATCH_" + name.upper().replace("-", "_"): name for name in
               ("account", "comment", "constraint", "cpus-per-gpu", "distribution", "exclusive", "export", "gpus",
                "gpus-per-node", "gpus-per-task", "gres", "hint", "no-kill", "no-requeue", "open-mode", "overcommit",
                "partition", "qos", "requeue", "reservation", "signal", "wait", "wckey", "delay-boot", "use-min-nodes",
                "profile", "power", "priority", "mem-per-cpu", "mem-per-gpu", "mem-per-node", "gpu-bind")},
    "srun": {"SLURM_" + name.upper().replace("-", "_"): name for name in
             ("distribution", "exact", "exclusive", "gpus", "gpus-per-node", "gpus-per-task", "gres", "immediate",
              "mem-per-cpu", "mem-per-gpu", "no-kill", "ntasks", "ntasks-per-node", "open-mode", "overcommit",
              "overlap", "partition", "wait", "cpus-per-gpu", "cpu-bind", "job-name", "threads", "hint", "comment")},
    "salloc": {"SALLOC_" + name.upper().replace("-", "_"): name for name in
               ("account", "exclusive", "gpus", "gpus-per-node", "immediate", "no-bell", "partition", "qos",
                "reservation", "gres", "signal")},
}
ENVIRONMENT["sbatch"].update({
    "SBATCH_TIMELIMIT": "time", "SBATCH_JOB_NAME": "job-name", "SBATCH_ARRAY_INX": "array", "SLURM_HINT": "hint",
    "SLURM_CLUSTERS": "clusters", "SBATCH_CLUSTERS": "clusters", "SBATCH_MEM_PER_NODE": "mem",
    "SBATCH_REQUEUE": "requeue", "SBATCH_NO_REQUEUE": "no-requeue", "SBATCH_GET_USER_ENV": "get-user-env"})
ENVIRONMENT["salloc"].update({"SALLOC_TIMELIMIT": "time", "SALLOC_MEM_PER_NODE": "mem"})
ENVIRONMENT["srun"].update({
    "SLURM_NNODES": "nodes", "SLURM_JOB_NUM_NODES": "nodes", "SLURM_NPROCS": "ntasks", "SLURM_NTASKS": "ntasks",
    "SLURM_MEM_PER_NODE": "mem", "SLURM_EXPORT_ENV": "export", "SLURM_LABELIO": "label",
    "SLURM_UNBUFFEREDIO": "unbuffered", "SLURM_KILL_BAD_EXIT": "kill-on-bad-exit", "SLURM_TIMELIMIT": "time",
    "SLURM_STDINMODE": "input", "SLURM_STDOUTMODE": "output", "SLURM_STDERRMODE": "error", "SLURM_JOB_ID": "jobid",
    "SLURM_WORKING_DIR": "chdir", "SRUN_CPUS_PER_TASK": "cpus-per-task", "SLURM_MPI_TYPE": "mpi",
    "SRUN_EXPORT_ENV": "export"})


# Reading ---------------------------------------------------------------------------------------

def try_help(tool):
    return 'Try "%s --help" for more information' % tool


def full_name(tool, written):
    """Long options may be cut short as long as they stay unique, as getopt does it."""
    kinds, _ = KNOWN[tool]
    if written in kinds:
        return written
    matches = [name for name in kinds if name.startswith(written)]
    if len(matches) != 1:
        trouble = "unrecognized option '--%s'" if not matches else "option '--%s' is ambiguous"
        raise Refusal(255, "%s: %s" % (tool, trouble % written), try_help(tool))
    return matches[0]


def read_long(tool, word, rest):
    written, equals, value = word[2:].partition("=")
    name = full_name(tool, written)
    kind = KNOWN[tool][0][name]
    if kind == "." and equals:
        raise Refusal(255, "%s: option '--%s' doesn't allow an argument" % (tool, name), try_help(tool))
    if kind == "=" and not equals:
        if not rest:
            raise Refusal(255, "%s: option '--%s' requires an argument" % (tool, name), try_help(tool))
        value = rest.pop(0)
    return name, value


def read_short(tool, word, rest):
    """`-N2`, `-N 2`, `-lu`: yields each option of the cluster."""
    kinds, letters = KNOWN[tool]
    letters_left = word[1:]
    while letters_left:
        letter, letters_left = letters_left[0], letters_left[1:]
        if letter not in letters or letter == "-":
            raise Refusal(255, "%s: invalid option -- '%s'" % (tool, letter), try_help(tool))
        name = letters[letter]
        if kinds[name] == ".":
            yield name, ""
            continue
        if kinds[name] == "=" and not letters_left:
            if not rest:
                raise Refusal(255, "%s: option requires an argument -- '%s'" % (tool, letter), try_help(tool))
            letters_left = rest.pop(0)
        yield name, letters_left
        return


def read_command_line(tool, argv):
    """-> ({option: text}, the words from the first that is no option)."""
    options, rest = {}, list(argv)
    while rest:
        word = rest[0]
        if word == "--":
            return options, rest[1:]
        if not word.startswith("-") or word == "-":
            break
        rest.pop(0)
        found = [read_long(tool, word, rest)] if word.startswith("--") else read_short(tool, word, rest)
        for name, value in found:
            options = overridden(options, {name: value})
    return check(tool, options), rest


OPPOSITES = {"requeue": "no-requeue", "no-requeue": "requeue"}


def overridden(*sources):
    """Options of several places, the later the stronger. The last word on --requeue counts, whichever it is."""
    options = {}
    for source in sources:
        for name, value in source.items():
            options.pop(OPPOSITES.get(name), None)
            options[name] = value
    return options


def read_environment(tool, environment):
    options = {}
    for variable, name in ENVIRONMENT[tool].items():
        if variable in environment:
            options = overridden(options, {name: environment[variable]})
    return check(tool, {name: value for name, value in options.items() if name in KNOWN[tool][0]})


def directive_words(line):
    """Words of one #SBATCH line: quotes group, # ends it, a backslash is dropped and protects nothing."""
    words, word, quote = [], None, ""
    for character in line:
        if quote:
            if character == quote:
                quote = ""
            else:
                word += character
        elif character in "'\"":
            quote, word = character, word or ""
        elif character == "#":
            break
        elif character == "\\":
            continue
        elif character.isspace():
            words, word = words + ([word] if word is not None else []), None
        else:
            word = (word or "") + character
    if quote:
        raise Refusal(1, "sbatch: error: Unmatched `%s` in [%s]" % (quote, line))
    return words + ([word] if word is not None else [])


def read_directives(script):
    """#SBATCH lines count up to the first line that is neither blank nor comment."""
    options = {}
    for line in script.splitlines()[1:]:
        if line.startswith("#SBATCH"):
            found, stray = read_command_line("sbatch", directive_words(line[len("#SBATCH"):]))
            if stray:
                raise Refusal(255, "sbatch: error: Invalid directive found in batch script: " + stray[0])
            options = overridden(options, found)
        elif line.strip() and not line.lstrip().startswith("#"):
            break
    return options


# Refusing --------------------------------------------------------------------------------------

def is_node_count(text):
    match = re.fullmatch(r"(\d+)[kKmM]?(?:-(\d+)[kKmM]?)?", text)
    return match and int(match.group(1)) > 0 and (not match.group(2) or int(match.group(2)) >= int(match.group(1)))


def is_user_signal(text):
    """[B:|R:]SIG[@N], N at most 65535."""
    match = re.fullmatch(r"(?:(?:b|r|rb|br):)?([^@:]+)(?:@(\d+))?", text, re.I)
    return match and parse_signal(match.group(1)) is not None and int(match.group(2) or 0) <= 65535


def is_hostlist(text):
    try:
        return bool(expand(text)) or "/" in text
    except BadHostlist:
        return False


INVALID = "%(tool)s: error: Invalid --%(name)s specification"
POSITIVE = (re.compile(r"[1-9]\d*").fullmatch, '%(tool)s: error: Invalid numeric value "%(value)s" for --%(name)s.')
CHECKS = {
    "time": (lambda text: parse_time(text) is not None, INVALID),
    "time-min": (lambda text: parse_time(text) is not None, INVALID),
    "mem": (lambda text: parse_megabytes(text) is not None, INVALID),
    "mem-per-cpu": (lambda text: parse_megabytes(text) is not None, INVALID),
    "mem-per-gpu": (lambda text: parse_megabytes(text) is not None, INVALID),
    "nodes": (is_node_count, '%(tool)s: error: "%(value)s" is not a valid node count'),
    "signal": (is_user_signal, INVALID),
    "ntasks": POSITIVE, "cpus-per-task": POSITIVE,
    "ntasks-per-node": (re.compile(r"\d+").fullmatch, POSITIVE[1]),
    "nodelist": (is_hostlist, "%(tool)s: error: Invalid --%(name)s specification"),
    "open-mode": (lambda text: text[:1].lower() in ("a", "t"), "%(tool)s: error: Invalid --open-mode specification"),
    "begin": (lambda text: parse_moment(text, 0) is not None, '%(tool)s: error: Invalid --begin specification "%(value)s"'),
    "kill-on-bad-exit": (lambda text: text in ("", "0", "1"), '%(tool)s: error: Invalid numeric value "%(value)s" for -K.'),
    "wait": (re.compile(r"\d*").fullmatch, '%(tool)s: error: Invalid numeric value "%(value)s" for --wait.'),
    "immediate": (re.compile(r"\d*").fullmatch, '%(tool)s: error: Invalid numeric value "%(value)s" for --immediate.'),
    "jobid": (re.compile(r"\d+(_\d+)?").fullmatch, '%(tool)s: error: Invalid numeric value "%(value)s" for --jobid.'),
}


def check(tool, options):
    for name, value in options.items():
        test, words = CHECKS.get(name, (None, None))
        if test and not test(value):
            raise Refusal(255, words % {"tool": tool, "name": name, "value": value})
    return options

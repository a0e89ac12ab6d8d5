"""How Slurm writes lists of hosts, times, sizes and counts: text in, values out, and back."""

import re
import time

UNLIMITED = "UNLIMITED"
SIGNALS = {"HUP": 1, "INT": 2, "QUIT": 3, "ABRT": 6, "KILL": 9, "USR1": 10, "SEGV": 11, "USR2": 12,
           "PIPE": 13, "ALRM": 14, "TERM": 15, "CHLD": 17, "CONT": 18, "STOP": 19, "TSTP": 20,
           "TTIN": 21, "TTOU": 22, "URG": 23, "XCPU": 24, "XFSZ": 25}


class BadHostlist(ValueError):
    pass


# Host lists ----------------------------------------------------------------------------------

def split_hosts(text):
    """Cut at commas and blanks that stand outside brackets."""
    words, word, depth = [], "", 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if depth <= 0 and character in ", \t\n":
            words.append(word)
            word = ""
        else:
            word += character
    words.append(word)
    return [word for word in words if word]


def bracket(text):
    """`1-3,07` -> ['1', '2', '3', '07']; the first number's width pads the range."""
    values = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise BadHostlist(text)
        first, last = match.group(1), match.group(2) or match.group(1)
        count = int(last) - int(first)
        if count < 0 or count >= 65536:
            raise BadHostlist(text)
        values += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return values


def combine(texts, ranges):
    """With three brackets Slurm runs the first before the second: n1x3 n2x3 n1x4 n2x4, each with the last."""
    if len(ranges) == 1:
        return [texts[0] + value for value in ranges[0]]
    *front, last = ranges
    if len(front) == 1:
        heads = [texts[0] + value for value in front[0]]
    else:
        heads = [texts[0] + a + texts[1] + b for b in front[1] for a in front[0]]
        if len(front) > 2:
            raise BadHostlist("too many brackets")
    return [head + texts[len(front)] + value for head in heads for value in last]


def expand(text, suffixes=False):
    """`a[1-2],b` -> ['a1', 'a2', 'b']. Text after the last bracket is allowed from 23.11 (suffixes)."""
    hosts = []
    for word in split_hosts(text):
        texts = re.split(r"\[[^\[\]]*\]", word)
        ranges = [bracket(inner) for inner in re.findall(r"\[([^\[\]]*)\]", word)]
        if not ranges:
            hosts.append(word)
            continue
        if texts[-1] and not suffixes:
            raise BadHostlist(text)
        hosts += [host + texts[-1] for host in combine(texts[:-1], ranges)]
    return hosts


def fold(hosts):
    """['n1', 'n2', 'm01'] -> 'n[1-2],m01'"""
    groups = {}
    for host in hosts:
        prefix, digits = re.fullmatch(r"(.*?)(\d*)", host, re.S).groups()
        width = len(digits) if digits.startswith("0") else 0
        groups.setdefault((prefix, width if digits else -1), []).append(digits)
    return ",".join(fold_group(prefix, width, digits) for (prefix, width), digits in groups.items())


def fold_group(prefix, width, digits):
    if width < 0:
        return ",".join([prefix] * len(digits))
    if len(digits) == 1:
        return prefix + digits[0]
    return "%s[%s]" % (prefix, fold_numbers([int(value) for value in digits], width))


def fold_numbers(numbers, width=0):
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    written = [[str(end).zfill(width) for end in run] for run in runs]
    return ",".join(first if first == last else first + "-" + last for first, last in written)


def counts(values):
    """[2, 2, 1] -> '2(x2),1', as in SLURM_TASKS_PER_NODE."""
    runs = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return ",".join(str(value) if times == 1 else "%d(x%d)" % (value, times) for value, times in runs)


# Times ---------------------------------------------------------------------------------------

def parse_time(text):
    """--time -> minutes, UNLIMITED, or None where Slurm refuses it. Seconds round up to a minute."""
    if text == "-1" or text.upper() in ("UNLIMITED", "INFINITE"):
        return UNLIMITED
    match = (re.fullmatch(r"(?P<d>\d+)-(?:(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?)?", text)
             or re.fullmatch(r"(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)", text)
             or re.fullmatch(r"(?P<m>-?\d+)(?::(?P<s>\d+))?", text))
    if not match:
        return None
    field = {name: int(value or 0) for name, value in match.groupdict().items()}
    seconds = (field.get("d", 0) * 86400 + field.get("h", 0) * 3600
               + field.get("m", 0) * 60 + field.get("s", 0))
    return -(-seconds // 60) or UNLIMITED


def print_time(seconds):
    """As squeue: `0:05`, `1:00:00`, `1-01:00:00`."""
    if seconds == UNLIMITED:
        return UNLIMITED
    if seconds < 0 or seconds >= 1 << 31:
        return "INVALID"
    days, rest = divmod(int(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    if days:
        return "%d-%02d:%02d:%02d" % (days, hours, minutes, seconds)
    if hours:
        return "%d:%02d:%02d" % (hours, minutes, seconds)
    return "%d:%02d" % (minutes, seconds)


def print_long_time(seconds):
    """As scontrol: `00:05:00`."""
    text = print_time(seconds)
    if "-" in text or not text[0].isdigit():
        return text
    return ":".join(part.zfill(2) for part in ("0:" + text if text.count(":") == 1 else text).split(":"))


def minutes_as_seconds(minutes):
    return minutes if minutes == UNLIMITED else minutes * 60


def clock(moment, environment, missing="N/A"):
    """A moment as SLURM_TIME_FORMAT in the asker's environment wants it."""
    if moment is None:
        return missing
    pattern = environment.get("SLURM_TIME_FORMAT", "standard")
    if pattern == "standard" or not pattern:
        pattern = "%Y-%m-%dT%H:%M:%S"
    if pattern == "relative":
        pattern = "%H:%M"
    return time.strftime(pattern, time.localtime(moment))


def parse_moment(text, now):
    """--begin -> unix seconds, or None."""
    match = re.fullmatch(r"now(?:\+(\d+)(second|sec|minute|min|hour|day|week)?s?)?", text)
    if match:
        unit = {"mi": 60, "ho": 3600, "da": 86400, "we": 604800}.get((match.group(2) or "")[:2], 1)
        return now + int(match.group(1) or 0) * unit
    for pattern in ("%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M", "%Y-%m-%d"):
        try:
            return time.mktime(time.strptime(text, pattern))
        except ValueError:
            continue
    match = re.fullmatch(r"(\d{1,2}):(\d\d)(?::(\d\d))?", text)
    if not match:
        return None
    today = time.localtime(now)
    wanted = time.mktime(today[:3] + (int(match.group(1)), int(match.group(2)), int(match.group(3) or 0), 0, 0, -1))
    return wanted if wanted >= now else wanted + 86400


# Sizes, signals, exit codes --------------------------------------------------------------------

def parse_megabytes(text):
    """--mem -> MB, or None where Slurm refuses it."""
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text, re.I)
    if not match:
        return None
    number, unit = int(match.group(1)), match.group(2).upper()
    return {"K": -(-number // 1024), "G": number << 10, "T": number << 20}.get(unit, number)


def print_megabytes(megabytes):
    if megabytes and megabytes % 1024 == 0:
        return "%dG" % (megabytes // 1024)
    return "%dM" % megabytes if megabytes else "0"


def parse_signal(text):
    """USR1, SIGUSR1, usr1, 10 -> 10, or None."""
    if text.isdigit():
        return int(text)
    name = text.upper()
    return SIGNALS.get(name[3:] if name.startswith("SIG") else name)


def compare_version(text):
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])

"""llmrun.py is a house of floors: a section uses only what stands above it in the file, its first screen lists
them, it imports nothing that is not there, only its commands speak, and it is not longer than a person reads.

`check(source)` says where a source breaks that; every rule is shown red below on a planted
violation. `python tests/test_house.py` prints each section's lines beside its budget."""

import ast
import glob
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize

import pytest

HOUSE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "llmrun.py")

FLOORS = {
    1: ("Basics", 270), 2: ("Config", 680), 3: ("Old files", 160), 4: ("Models", 380), 5: ("Slurm", 340), 6: ("Run", 230),
    7: ("State", 230), 8: ("Environment", 300), 9: ("Wire", 450), 10: ("Transfers", 260), 11: ("Nodes", 580),
    12: ("Programs", 300), 13: ("Engines", 720), 14: ("Services", 260), 15: ("Input", 550), 16: ("Journal", 430),
    17: ("Claims", 200), 18: ("Pump", 430), 19: ("Metrics", 300), 20: ("Gateway", 420), 21: ("Driver", 540),
    22: ("Commands", 1000), 23: ("Assets", 650)}
COMMANDS, ASSETS, LONGEST = 22, 23, 60
LIMIT = 10000  # of the whole file: more than that is no longer one file that a person reads
GUESTS = {"requests", "openai", "tomli", "tomllib", "pip._vendor.tomli"}  # not in every Python 3.9
GONE = {"asynchat", "asyncore", "binhex", "distutils", "formatter", "imp", "parser", "smtpd", "symbol", "aifc",
        "audioop", "cgi", "cgitb", "chunk", "crypt", "imghdr", "mailcap", "msilib", "nis", "nntplib", "ossaudiodev",
        "pipes", "sndhdr", "spwd", "sunau", "telnetlib", "uu", "xdrlib", "lib2to3"}  # not in every later one
LATE = {"tomllib", "annotationlib", "compression", "concurrent.interpreters", "string.templatelib"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BAR = re.compile(r"# ═{10,}$")


def check(source):
    """Every breach of the house's rules, as (line, text), in the order of the lines."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return [(error.lineno or 1, "cannot be read by Python %d.%d: %s" % (*sys.version_info[:2], error.msg))]
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    sections, problems = read_sections(tokens, len(source.splitlines()))
    problems += check_floors(tree, sections) + check_lengths(tree, sections) + check_imports(tree, sections)
    problems += check_silence(tree, sections) + check_map(tree, sections)
    return sorted(set(problems))


# ── sections ───────────────────────────────────────────────────────────────────────────────

class Section:
    def __init__(self, number, name, first, last):
        self.number, self.name, self.first, self.last = number, name, first, last

    def __str__(self):
        return "%d · %s" % (self.number, self.name) if self.number else "the opening"


def read_sections(tokens, lines):
    """The opening and the sections, and what is wrong with their banners."""
    comments = {tok.start[0]: tok.string for tok in tokens if tok.type == tokenize.COMMENT and not tok.start[1]}
    sections, problems, line = [Section(0, "", 1, lines)], [], 0
    while line < lines:
        line += 1
        if not BAR.match(comments.get(line, "")):
            continue
        first, title = line, re.match(r"# (\d+) · (.+)$", comments.get(line + 1, ""))
        if not title:
            problems.append((line, "a bar that opens no section: below it belongs `# NUMBER · NAME`"))
            continue
        line += 2
        opened = comments.get(line) == "#"
        words = 0
        while line + 1 in comments and not BAR.match(comments[line + 1]):
            line += 1
            words += bool(comments[line].strip("# "))
        if not opened or not words or not BAR.match(comments.get(line + 1, "")):
            problems.append((first, "the banner of %s lacks its opening comment: `#`, then lines that say what it "
                                    "owns and what it leaves to others, then a bar" % title[0][2:]))
        else:
            line += 1
        number, name = int(title[1]), title[2]
        if FLOORS.get(number, ("",))[0] != name:
            problems.append((first + 1, "no such section in the design: %d · %s" % (number, name)))
        elif number <= sections[-1].number:
            problems.append((first + 1, "%d · %s stands after %s" % (number, name, sections[-1])))
        sections[-1].last = first - 1
        sections.append(Section(number, name, first, lines))
    return sections, problems


def check_map(tree, sections):
    """The module's docstring lists the sections, in their order, each with what it holds."""
    listed = re.findall(r"(?m)^ +(\d+) · (\S.*?)  +\S", ast.get_docstring(tree, clean=False) or "")
    wanted = [(str(section.number), section.name) for section in sections if section.number]
    return [(1, "the docstring's list of sections is not that of the banners: %s"
             % sorted(set(listed) ^ set(wanted)))] if listed != wanted else []


def section_of(line, sections):
    return next(section for section in reversed(sections) if section.first <= line)


def is_main_guard(node):
    return (isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and isinstance(node.test.left, ast.Name)
            and node.test.left.id == "__name__" and getattr(node.test.comparators[0], "value", "") == "__main__")


def walk(tree):
    """All nodes but those of the final `main()` call, which belongs to no floor."""
    for node in tree.body:
        if not is_main_guard(node):
            yield from ast.walk(node)


def table(source):
    """Each section's lines beside its budget, as text."""
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    lines = len(source.splitlines())
    rows = ["%-20s %6s %6s" % ("section", "lines", "budget")]
    for section in read_sections(tokens, lines)[0]:
        used, budget = section.last - section.first + 1, FLOORS.get(section.number, ("", ""))[1]
        over = "  over by %d" % (used - budget) if budget and used > budget else ""
        rows.append("%-20s %6d %6s%s" % (section, used, budget, over))
    rows.append("%-20s %6d %6d" % ("all", lines, LIMIT))
    return "\n".join(rows)


# ── floors: who uses whom ──────────────────────────────────────────────────────────────────

class Scope:
    """One namespace, the names bound in it with their lines, and what it declares global."""

    def __init__(self, node):
        self.node, self.names, self.globals = node, {}, set()
        if isinstance(node, (ast.Lambda, *FUNCTIONS)):
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg):
                    self.bind(argument.arg, argument)
            self.collect(node.body if isinstance(node.body, list) else [node.body])
        elif isinstance(node, COMPREHENSIONS):
            for part in node.generators:
                self.collect([part.target])
        else:
            self.collect(node.body)

    def bind(self, name, node):
        self.names.setdefault(name, []).append(node.lineno)

    def collect(self, nodes):
        for node in nodes:
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                self.bind(node.id, node)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in node.names:
                    self.bind(alias.asname or alias.name.split(".")[0], node)
            elif isinstance(node, ast.Global):
                self.globals.update(node.names)
            elif isinstance(node, (ast.ClassDef, *FUNCTIONS)):
                self.bind(node.name, node)
            elif isinstance(node, ast.ExceptHandler) and node.name:
                self.bind(node.name, node)
            elif type(node).__name__ in ("MatchAs", "MatchStar") and node.name:
                self.bind(node.name, node)
            elif type(node).__name__ == "MatchMapping" and node.rest:
                self.bind(node.rest, node)
            if isinstance(node, (ast.ClassDef, ast.Lambda, *FUNCTIONS, *COMPREHENSIONS)):
                # Another namespace; only what `:=` binds inside a comprehension comes out of it.
                if isinstance(node, COMPREHENSIONS):
                    self.collect(sub.target for sub in ast.walk(node) if isinstance(sub, ast.NamedExpr))
            else:
                self.collect(ast.iter_child_nodes(node))

    def has(self, name, line):
        if isinstance(self.node, ast.ClassDef):  # before its binding a class body sees the module's
            return any(bound < line for bound in self.names.get(name, ()))
        return name in self.names


class Floors:
    """Walks the file as Python would look names up, and notes what reaches a later section."""

    def __init__(self, tree, sections):
        self.tree, self.sections, self.problems = tree, sections, []
        self.module, self.seen_through = Scope(tree), set()
        self.line = None  # of the text that a string annotation was read from
        self.imported = {alias.asname or alias.name.split(".")[0] for node in tree.body
                         if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        for name, lines in self.module.names.items():
            homes = {section_of(line, sections).number: line for line in sorted(lines, reverse=True)}
            for line in [line for number, line in sorted(homes.items())][1:]:
                self.note(line, "`%s` is bound a second time, in another section (first in line %d)"
                          % (name, min(lines)))
        for node in tree.body:
            if not is_main_guard(node):
                self.visit(node, [self.module])

    def note(self, line, text):
        self.problems.append((line, text))

    def is_global(self, name, line, chain):
        for depth, scope in enumerate(reversed(chain)):
            if scope is self.module:
                return True
            if name in scope.globals:
                return True
            if isinstance(scope.node, ast.ClassDef) and depth:
                continue
            if scope.has(name, line):
                return False
        return True

    def home(self, name):
        """The section that defines a module-level name, None for what is built in."""
        lines = self.module.names.get(name)
        return section_of(min(lines), self.sections) if lines else None

    def use(self, name, line, chain):
        if not self.is_global(name, line, chain):
            return
        home, user = self.home(name), section_of(line, self.sections)
        if not home:
            if name in ("globals", "eval", "exec", "__import__") or (
                    name in ("vars", "locals") and chain == [self.module]):
                self.note(line, "`%s` reaches names behind the reader's back" % name)
        elif user.number == ASSETS and home.number != ASSETS:
            self.note(line, "`%s` (line %d): Assets uses nothing" % (name, min(self.module.names[name])))
        elif home.number > user.number and home.number != ASSETS:
            self.note(line, "`%s` belongs to %s (line %d), which stands above %s"
                      % (name, home, min(self.module.names[name]), user))

    def store(self, node, chain):
        """`Name.attribute = …` and `NAME[key] = …` on another section's name is a hook upstairs."""
        base = node
        while isinstance(base, (ast.Attribute, ast.Subscript)):
            base = base.value
        if isinstance(base, ast.Name):
            self.hook(base, node.lineno, chain)

    def hook(self, base, line, chain):
        home = self.home(base.id)
        line = self.line or line
        if (home and base.id not in self.imported and self.is_global(base.id, line, chain)
                and home.number != section_of(line, self.sections).number):
            self.note(line, "`%s` of %s is changed from outside" % (base.id, home))

    def visit(self, node, chain):
        line = self.line or getattr(node, "lineno", None)
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load) and node not in self.seen_through:
                self.use(node.id, line, chain)
        elif isinstance(node, ast.Global):
            for name in node.names:
                self.use(name, line, chain)
            self.note(line, "`global %s`: state belongs in a class" % ", ".join(node.names))
        elif isinstance(node, FUNCTIONS):
            self.visit_function(node, chain)
        elif isinstance(node, ast.Lambda):
            self.visit_all(node.args.defaults + [d for d in node.args.kw_defaults if d], chain)
            self.visit(node.body, chain + [Scope(node)])
        elif isinstance(node, ast.ClassDef):
            self.visit_all(node.decorator_list + node.bases + node.keywords, chain)
            self.visit_all(node.body, chain + [Scope(node)])
        elif isinstance(node, COMPREHENSIONS):
            self.visit_comprehension(node, chain)
        elif isinstance(node, ast.AnnAssign):
            self.visit_annotation(node.annotation, chain)
            self.visit_all([node.target] + [v for v in [node.value] if v], chain)
        else:
            self.visit_trick(node, line, chain)
            self.visit_all(ast.iter_child_nodes(node), chain)

    def visit_all(self, nodes, chain):
        for node in nodes:
            self.visit(node, chain)

    def visit_function(self, node, chain):
        self.visit_all(node.decorator_list + node.args.defaults + [d for d in node.args.kw_defaults if d], chain)
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg) and argument.annotation:
                self.visit_annotation(argument.annotation, chain)
        if node.returns:
            self.visit_annotation(node.returns, chain)
        self.visit_all(node.body, chain + [Scope(node)])

    def visit_comprehension(self, node, chain):
        self.visit(node.generators[0].iter, chain)
        inner = chain + [Scope(node)]
        for number, part in enumerate(node.generators):
            self.visit_all([part.target] + ([part.iter] if number else []) + part.ifs, inner)
        self.visit_all([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt], inner)

    def visit_annotation(self, node, chain):
        """An annotation, and the names inside those of its parts that are strings."""
        self.visit(node, chain)
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                self.visit_text(part, chain)

    def visit_text(self, node, chain):
        try:
            inner = ast.parse(node.value.strip(), mode="eval").body
        except SyntaxError:
            return
        self.line = node.lineno
        self.visit_annotation(inner, chain)
        self.line = None

    def visit_trick(self, node, line, chain):
        if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            self.store(node, chain)
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if (owner, node.attr) == ("sys", "modules") or node.attr in (
                    "__globals__", "f_globals", "spec_from_file_location", "SourceFileLoader", "run_path",
                    "run_module"):
                self.note(line, "`%s` reaches names behind the reader's back" % node.attr)
        if not isinstance(node, ast.Call):
            return
        called = getattr(node.func, "id", "") or getattr(node.func, "attr", "")
        first = node.args[0] if node.args else None
        if called in ("import_module", "__import__"):
            named = self.values(first)
            if named and all(map(can_import, named)):
                self.seen_through.add(node.func)
            elif called == "import_module":
                self.note(line, "`import_module` of what nobody can see from here")
        if called in ("setattr", "delattr") and isinstance(first, ast.Name):
            self.hook(first, line, chain)
        if called == "cast" and isinstance(first, ast.Constant) and isinstance(first.value, str):
            self.visit_text(first, chain)


    def values(self, node):
        """The texts that an argument can be: it is one, or a loop's name for each of a few."""
        if isinstance(node, ast.Constant):
            return [str(node.value)]
        for loop in ast.walk(self.tree):
            if (isinstance(loop, ast.For) and isinstance(node, ast.Name) and getattr(loop.target, "id", "") == node.id
                    and loop.lineno <= node.lineno <= loop.end_lineno and isinstance(loop.iter, (ast.Tuple, ast.List))):
                return [str(getattr(part, "value", "")) for part in loop.iter.elts]
        return []


def check_floors(tree, sections):
    return Floors(tree, sections).problems


# ── sizes, imports, silence ────────────────────────────────────────────────────────────────

def check_lengths(tree, sections):
    lines = sections[-1].last
    problems = [(lines, "the file has %d lines; %d is the limit" % (lines, LIMIT))] if lines > LIMIT else []

    def measure(node):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, FUNCTIONS):
                measure(child)
            elif section_of(child.lineno, sections).number != ASSETS:
                lines = child.end_lineno - child.lineno + 1
                if lines > LONGEST:
                    problems.append((child.lineno, "%s has %d lines; it must fit on a screen (%d at the most)"
                                     % (child.name, lines, LONGEST)))
    measure(tree)
    return problems


def in_library(module):
    top = module.split(".")[0]
    if module in LATE or top in LATE or top in GONE:
        return False
    if hasattr(sys, "stdlib_module_names"):
        return top in sys.stdlib_module_names and top != "__main__"
    library = os.path.dirname(os.__file__)
    return top in sys.builtin_module_names or bool(glob.glob(os.path.join(library, top + ".py"))) or os.path.exists(
        os.path.join(library, top, "__init__.py")) or bool(glob.glob(os.path.join(library, "lib-dynload", top + ".*")))


def can_import(module):
    return in_library(module) or module in GUESTS


def imported_modules(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.module == "pip._vendor":
            return ["pip._vendor." + alias.name for alias in node.names]
        return ["." * node.level + (node.module or "")]
    return []


def check_imports(tree, sections):
    problems = []
    checked = next((node.lineno for node in tree.body if isinstance(node, ast.If) and any(
        isinstance(part, ast.Attribute) and part.attr == "version_info" for part in ast.walk(node.test))), None)
    if checked is None:
        problems.append((1, "no check of the Python version"))

    def visit(node, inside):
        for module in imported_modules(node):
            if module == "__future__":
                continue
            if module.strip(".") in ("llmrun", "__main__", ""):
                problems.append((node.lineno, "the file imports itself"))
            elif not can_import(module):
                problems.append((node.lineno, "`%s` is not in every standard library from 3.9 on" % module))
            elif not inside and not in_library(module):
                problems.append((node.lineno, "`%s` may be missing: import it in the function that needs it" % module))
            elif not inside and section_of(node.lineno, sections).number:
                problems.append((node.lineno, "`%s`: the standard library is imported at the top, or in the "
                                              "function that needs it" % module))
            elif not inside and checked and node.lineno < checked and module not in ("sys", "os"):
                problems.append((node.lineno, "`%s` is imported before the version check (line %d)"
                                 % (module, checked)))
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, FUNCTIONS))
    visit(tree, False)
    return problems


def check_silence(tree, sections):
    """Nobody below the commands prints or exits."""
    problems = []
    for node in walk(tree):
        section = section_of(getattr(node, "lineno", 1), sections).number
        if not section or section == COMMANDS:
            continue
        what = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "print" and not any(
                    word.arg == "file" and not is_standard_stream(word.value) for word in node.keywords):
                what = "print"
            elif node.func.id in ("exit", "quit"):
                what = node.func.id
        elif isinstance(node, ast.Attribute) and node.attr == "exit" and getattr(node.value, "id", "") == "sys":
            what = "sys.exit"
        elif isinstance(node, ast.Raise) and "SystemExit" in {
                getattr(part, "id", "") for part in ast.walk(node.exc or node)}:
            what = "raise SystemExit"
        if what:
            problems.append((node.lineno, "`%s`: nobody below the commands prints or exits" % what))
    return problems


def is_standard_stream(node):
    return isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr", "__stdout__", "__stderr__")


# ── grammar ────────────────────────────────────────────────────────────────────────────────

def newer_grammar(path):
    """What of a file Python 3.7 cannot read, by ruff: the oldest that it knows. A real 3.6 names the rest, where there is one."""
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E9", "--target-version", "py37",
                           "--output-format", "concise", str(path)], stdout=subprocess.PIPE, universal_newlines=True)
    return [line for line in done.stdout.splitlines() if line.startswith(str(path))]


# ── the house itself ───────────────────────────────────────────────────────────────────────

def read_house():
    with open(HOUSE, encoding="utf-8") as file:
        return file.read()


def old_pythons():
    """Real interpreters of the versions that must be able to read the file."""
    found = []
    for version in ("3.6", "3.7", "3.8"):
        places = sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/%s.*/bin/python" % version)))
        for path in [*places, shutil.which("python" + version)]:
            if path and not subprocess.call([path, "-c", ""], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
                found.append(path)
                break
    return found


def test_the_house_stands():
    source = read_house()
    print("\n" + table(source))
    assert not check(source), "\n" + "\n".join("llmrun.py:%d: %s" % problem for problem in check(source))
    assert not newer_grammar(HOUSE)


@pytest.mark.parametrize("python", old_pythons())
def test_an_old_python_reads_the_whole_file(python):
    words = "import sys; compile(open(sys.argv[1], encoding='utf-8').read(), sys.argv[1], 'exec')"
    done = subprocess.run([python, "-c", words, HOUSE], stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()


# ── every rule, shown red ──────────────────────────────────────────────────────────────────

OPENING = "import sys\nif sys.version_info < (3, 9):\n    sys.exit(2)\n"
BANNER = "# %s\n# %%s\n#\n# What it owns, what it leaves to others.\n# %s" % ("═" * 79, "═" * 79)


def house(text, opening=OPENING):
    """A small house with its map: `§ 2 · Config` stands for a banner, `#!` marks the line that must be named."""
    source = opening + re.sub(r"(?m)^§ (.*)$", lambda found: BANNER % found[1], text.strip("\n")) + "\n"
    if source.startswith('"""'):
        return source
    unmarked = source.replace("  #!", "")
    sections, _ = read_sections(list(tokenize.generate_tokens(io.StringIO(unmarked).readline)), len(source.splitlines()))
    return '"""\n%s"""\n' % "".join("  %s  what it owns\n" % section for section in sections if section.number) + source


def planted(case):
    return house(*case) if isinstance(case, tuple) else house(case)


def upstairs(use):
    return "§ 2 · Config\n%s\n§ 5 · Slurm\nclass Later:\n    pass\nlater = LATER = 4\n" % use


PLANTED = {
    # floors
    "a call upstairs": upstairs("def f():\n    return Later()  #!"),
    "a constant upstairs at module level": upstairs("x = LATER  #!"),
    "an annotation": upstairs("def f(x: Later):  #!\n    pass"),
    "a result annotation": upstairs("def f() -> Later:  #!\n    pass"),
    "a string annotation": upstairs("def f(x: 'Later'):  #!\n    pass"),
    "a string inside an annotation": upstairs("from_ = 1\ndef f(x: list['Later']):  #!\n    pass"),
    "a field's annotation": upstairs("class C:\n    x: 'Later'  #!"),
    "a local annotation": upstairs("def f():\n    x: Later = 3  #!\n    return x"),
    "a default": upstairs("def f(x=later):  #!\n    pass"),
    "a keyword default": upstairs("f = lambda *, x=later: x  #!"),
    "a decorator": upstairs("@later  #!\ndef f():\n    pass"),
    "a base class": upstairs("class C(Later):  #!\n    pass"),
    "a nested function": upstairs("def f():\n    def g():\n        return later  #!\n    return g"),
    "a method whose class has that name":
        upstairs("class C:\n    later = 1\n    def f(self):\n        return later  #!"),
    "a class body before its own name": upstairs("class C:\n    later = later  #!"),
    "the first loop of a comprehension": upstairs("x = [later for later in later]  #!"),
    "an f-string": upstairs("def f():\n    return f'{later}'  #!"),
    "a lambda's body": upstairs("f = lambda x: later  #!"),
    "the opening": "x = later  #!\n§ 2 · Config\nlater = 1",
    "a use after a local of another function":
        upstairs("def f():\n    later = 1\n    return later\ndef g():\n    return later  #!"),
    "assets use something": "§ 1 · Basics\nx = 1\n§ 23 · Assets\nPAGE = '%s' % x  #!",
    "assets use a module": "§ 1 · Basics\nx = 1\n§ 23 · Assets\nPAGE = sys.path  #!",
    # tricks
    "globals": "§ 1 · Basics\ndef f():\n    return globals()['later']  #!",
    "sys.modules": "§ 1 · Basics\ndef f():\n    return sys.modules[__name__].later  #!",
    "eval": "§ 1 · Basics\ndef f():\n    return eval('later')  #!",
    "vars of the module": "§ 1 · Basics\nx = vars()  #!",
    "import of itself": "§ 1 · Basics\ndef f():\n    import llmrun  #!\n    return llmrun",
    "import_module of itself":
        "§ 1 · Basics\ndef f():\n    import importlib\n    return importlib.import_module(__name__)  #!",
    "__import__ of itself": "§ 1 · Basics\ndef f():\n    return __import__('llmrun')  #!",
    "__import__ of what a variable says": "§ 1 · Basics\ndef f(x):\n    return __import__(x)  #!",
    "a function's globals": "§ 1 · Basics\ndef f():\n    return f.__globals__  #!",
    "global": "§ 1 · Basics\nx = None\ndef f():\n    global x  #!\n    x = 1",
    "a name bound in two sections": "§ 1 · Basics\nx = None\n§ 2 · Config\nx = 1  #!",
    "a hook by attribute": "§ 1 · Basics\nclass C:\n    f = None\n§ 2 · Config\ndef f():\n    C.f = f  #!",
    "a hook by key": "§ 1 · Basics\nTABLE = {}\n§ 2 · Config\nTABLE['a'] = 1  #!",
    "a hook by setattr": "§ 1 · Basics\nclass C:\n    f = None\n§ 2 · Config\nsetattr(C, 'f', 1)  #!",
    # banners
    "a banner without a comment": "§ 1 · Basics\nx = 1\n# %s  #!\n# 2 · Config\n# %s\ny = 1" % ("═" * 20, "═" * 20),
    "a banner without its second bar": "# %s  #!\n# 1 · Basics\n#\n# What it owns.\ny = 1" % ("═" * 20),
    "a bar alone": "§ 1 · Basics\nx = 1\n# %s  #!\ny = 1" % ("═" * 20),
    "sections out of order": "§ 2 · Config\nx = 1\n# %s\n# 1 · Basics  #!\n#\n# What.\n# %s" % ("═" * 20, "═" * 20),
    "an unknown number": "# %s\n# 24 · Attic  #!\n#\n# What.\n# %s" % ("═" * 20, "═" * 20),
    "an unknown name": "# %s\n# 1 · Cellar  #!\n#\n# What.\n# %s" % ("═" * 20, "═" * 20),
    # sizes
    "a long function": "§ 1 · Basics\ndef f():  #!\n" + "    x = 1\n" * 60,
    "a long method with a nested function": "§ 1 · Basics\nclass C:\n    async def f(self):  #!\n        def g():\n"
                                            + "            x = 1\n" * 59,
    # imports
    "a foreign package": "§ 1 · Basics\ndef f():\n    import numpy  #!\n    return numpy",
    "a guest at the top": "import requests  #!\n§ 1 · Basics",
    "a module that 3.9 lacks, at the top": "import tomllib  #!\n§ 1 · Basics",
    "a module that later ones lack": "import pipes  #!\n§ 1 · Basics",
    "another part of pip": "§ 1 · Basics\ndef f():\n    from pip._vendor import urllib3  #!\n    return urllib3",
    "a relative import": "§ 1 · Basics\ndef f():\n    from . import x  #!\n    return x",
    "the library in the middle": "§ 1 · Basics\nx = 1\nimport json  #!",
    "an import before the version check": ("§ 1 · Basics", "import sys\nimport json  #!\n" + OPENING),
    # silence
    "a print below": "§ 9 · Wire\ndef f():\n    print('hello')  #!",
    "a print to stderr": "§ 9 · Wire\ndef f():\n    print('hello', file=sys.stderr)  #!",
    "an exit below": "§ 21 · Driver\ndef f():\n    sys.exit(3)  #!",
    "a SystemExit below": "§ 21 · Driver\ndef f():\n    raise SystemExit(3)  #!",
    # the map
    "a map without a section": ("§ 1 · Basics\nx = 1\n§ 2 · Config\ny = 1", '"""A house.  #!\n\n  1 · Basics  what it owns\n"""\n' + OPENING),
    "a map in another order":
        ("§ 1 · Basics\nx = 1\n§ 2 · Config\ny = 1",
         '"""A house.  #!\n\n  2 · Config  what it owns\n  1 · Basics  what it owns\n"""\n' + OPENING),
}


@pytest.mark.parametrize("rule", PLANTED)
def test_a_planted_violation_is_named_with_its_line(rule):
    source = planted(PLANTED[rule])
    marked = [number for number, line in enumerate(source.splitlines(), 1) if line.endswith("  #!")]
    source = source.replace("  #!", "")
    assert {line for line, _ in check(source)} == set(marked), check(source)


def test_a_file_that_is_too_long_is_named():
    source = house("§ 1 · Basics\n" + "x = 1\n" * LIMIT)
    assert [text for _, text in check(source)] == ["the file has %d lines; 10000 is the limit" % len(source.splitlines())]


def test_newer_grammar_is_named(tmp_path):
    newer = ["if (n := 3):\n    pass", "with (open('a') as a, open('b') as b):\n    pass", "match y:\n    case 1:\n        pass",
             "def f(a, /, b):\n    pass", "def f(a):\n    return 1, *a", "y = f'{y['a']}'", "def f[T](x):\n    pass"]
    for number, text in enumerate(newer):
        path = tmp_path / ("%d.py" % number)
        path.write_text("y = {}\n%s\n" % text)
        assert newer_grammar(path), text


def test_a_file_without_a_version_check_is_named():
    assert check("import sys\n") == [(1, "no check of the Python version")]


CLEAN = {
    "a local of the same name": upstairs("def f():\n    later = 1\n    return later"),
    "a parameter": upstairs("def f(later, *LATER, **Later):\n    return later, LATER, Later"),
    "a lambda's parameter": upstairs("f = lambda later: later"),
    "a comprehension's variable": upstairs("x = [later for later in 'abc' if later]"),
    "a dict comprehension's": upstairs("x = {later: LATER for later, LATER in {}.items()}"),
    "a loop variable in a function": upstairs("def f():\n    for later in 'abc':\n        return later"),
    "a with and an except name": upstairs("def f():\n    with open('a') as later:\n        later.read()\n"
                                          "    try:\n        pass\n    except OSError as LATER:\n        raise LATER"),
    "an inner import": upstairs("def f():\n    import json as later\n    return later"),
    "an enclosing function's local": upstairs("def f(later):\n    def g():\n        return later\n    return g"),
    "nonlocal": upstairs("def f():\n    later = 1\n    def g():\n        nonlocal later\n        later = 2\n    return g"),
    "an inner function and class":
        upstairs("def f():\n    def later():\n        pass\n    class Later:\n        pass\n    return later, Later"),
    "an attribute and a keyword": upstairs("def f(x):\n    x.later = x.LATER\n    return f(later=1)"),
    "a class's own name": upstairs("class C:\n    later = 1\n    other = later"),
    "a literal string that reads like a name": upstairs("from_ = {'Later': 'later'}"),
    "a name later in its own section": "§ 2 · Config\ndef f():\n    return g()\ndef g():\n    return 1",
    "downstairs": "§ 1 · Basics\nx = 1\n§ 9 · Wire\ndef f(y: 'x' = x):\n    return x",
    "an asset": "§ 1 · Basics\ndef f():\n    return PAGE\n§ 23 · Assets\nPAGE = 'text'\nTWICE = PAGE * 2",
    "the final call": "§ 22 · Commands\ndef main():\n    return 0\n§ 23 · Assets\nPAGE = ''\n"
                      "if __name__ == '__main__':\n    sys.exit(main())",
    "a bar inside a text": "§ 23 · Assets\nPAGE = '''\n# %s\n# 1 · Basics\n'''" % ("═" * 20),
    "a long table": "§ 1 · Basics\nTABLE = {\n" + "    'a': 1,\n" * 80 + "}",
    "guests in a function": "§ 2 · Config\ndef f():\n    try:\n        import tomllib\n    except ImportError:\n"
                            "        from pip._vendor import tomli as tomllib\n    import requests, json\n"
                            "    return tomllib, requests, json",
    "guests in a loop over their names":
        "§ 2 · Config\ndef f():\n    for name in ('tomllib', 'pip._vendor.tomli'):\n        return __import__(name)",
    "a command prints and exits": "§ 22 · Commands\ndef f():\n    print('hello')\n    sys.exit(1)",
    "print to a stream that was passed": "§ 9 · Wire\ndef f(out):\n    print('a', file=out)\n    out.write('b')",
    "os._exit": ("§ 11 · Nodes\ndef f():\n    os._exit(1)", OPENING + "import os\n"),
    "os and sys before the check": ("§ 1 · Basics", "import os\n" + OPENING),
    "os.environ and an object's own fields": (
        "§ 1 · Basics\ndef f(self):\n    os.environ['a'] = 'b'\n    self.x = {}\n    self.x['y'] = 1",
        OPENING + "import os\n"),
}


@pytest.mark.parametrize("case", CLEAN)
def test_what_is_allowed_raises_no_alarm(case):
    assert check(planted(CLEAN[case])) == []


def test_the_table_shows_each_section_beside_its_budget():
    text = table(house("§ 1 · Basics\nx = 1\n§ 23 · Assets\n" + "PAGE = 1\n" * 700))
    assert "1 · Basics                6    270\n" in text and "over by 55" in text
    assert text.splitlines()[-1].split()[0] == "all"


if __name__ == "__main__":
    house_source = read_house()
    print(table(house_source))
    found = check(house_source) + [(0, words) for words in newer_grammar(HOUSE)]
    for at, words in found:
        print("llmrun.py:%d: %s" % (at, words))
    sys.exit(bool(found))

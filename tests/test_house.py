"""llmrun.py is a house of floors: a section uses only what stands above it in the file, its words
can be read by Python 3.6, it imports nothing that is not there, and only its commands speak.

`check(source)` says where a source breaks that; every rule is shown red below on a planted
violation. `python tests/test_house.py` prints each section's lines beside its budget."""

import ast
import glob
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize

import pytest

HOUSE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "llmrun.py")

FLOORS = {1: ("Basics", 150), 2: ("Config", 350), 3: ("Models", 250), 4: ("Slurm", 250), 5: ("Run", 150),
          6: ("Environment", 150), 7: ("Wire", 350), 8: ("Nodes", 250), 9: ("Engines", 400), 10: ("Services", 150),
          11: ("Prompts", 330), 12: ("Work", 300), 13: ("Metrics", 180), 14: ("Gateway", 280), 15: ("Driver", 200),
          16: ("Commands", 430), 17: ("Assets", 350)}
COMMANDS, ASSETS, TOTAL, LONGEST = 16, 17, 4500, 60
GUESTS = {"requests", "openai", "tomli", "tomllib", "pip._vendor.tomli"}  # not in every Python 3.9
GONE = {"asynchat", "asyncore", "binhex", "distutils", "formatter", "imp", "parser", "smtpd", "symbol", "aifc",
        "audioop", "cgi", "cgitb", "chunk", "crypt", "imghdr", "mailcap", "msilib", "nis", "nntplib", "ossaudiodev",
        "pipes", "sndhdr", "spwd", "sunau", "telnetlib", "uu", "xdrlib", "lib2to3"}  # not in every later one
LATE = {"tomllib", "annotationlib", "compression", "concurrent.interpreters", "string.templatelib"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LOOPS = (ast.For, ast.AsyncFor, ast.While)
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
    problems += check_silence(tree, sections) + check_grammar(tree, source, tokens)
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
    rows.append("%-20s %6d %6d%s" % ("all", lines, TOTAL, "  over by %d" % (lines - TOTAL) if lines > TOTAL else ""))
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
    problems = []

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


# ── grammar: what Python 3.6 can read ──────────────────────────────────────────────────────

def check_grammar(tree, source, tokens):
    problems = []
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        for line, what, since in newer_words(node, lines):
            problems.append((line, "%s: grammar of Python %s" % (what, since)))
    for line, what, since in [*newer_contexts(tree, tokens), *newer_f_strings(tokens, lines)]:
        problems.append((line, "%s: grammar of Python %s" % (what, since)))
    return problems + awaits_in_odd_places(tree)


def newer_words(node, lines):
    """(line, what, since) of what one node says that 3.6 cannot read."""
    kind, line = type(node).__name__, getattr(node, "lineno", 0)
    if kind == "NamedExpr":
        yield line, "`:=`", "3.8"
    if isinstance(node, (ast.Lambda, *FUNCTIONS)) and node.args.posonlyargs:
        yield line, "positional-only parameters", "3.8"
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        for alias in node.names:
            if alias.name == "annotations":
                yield line, "`from __future__ import annotations`", "3.7"
    if kind == "Match":
        yield line, "`match`", "3.10"
    if kind == "TryStar":
        yield line, "`except*`", "3.11"
    if getattr(node, "type_params", None) or kind == "TypeAlias":
        yield line, "type parameters", "3.12"
    if kind == "TemplateStr":
        yield line, "a template string", "3.14"
    for decorator in getattr(node, "decorator_list", []):
        if not is_plain_decorator(decorator) or stands_after("(", decorator, lines):
            yield decorator.lineno, "a decorator that is more than a dotted name and a call", "3.9"
    if isinstance(node, (ast.Return, ast.Yield)) and has_star(node.value) and not enclosed(node.value, lines):
        yield node.value.lineno, "a starred expression without parentheses", "3.8"
    if isinstance(node, (ast.For, ast.AsyncFor)) and has_star(node.iter) and not enclosed(node.iter, lines):
        yield node.iter.lineno, "a starred expression without parentheses", "3.9"
    if isinstance(node, ast.Subscript):
        index = node.slice
        if isinstance(index, ast.Starred) or has_star(index) and not enclosed(index, lines):
            yield index.lineno, "a starred expression in an index", "3.11"
    if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Tuple) and not enclosed(node.value, lines):
        yield node.value.lineno, "an annotated tuple without parentheses", "3.8"
    if isinstance(node, ast.arg) and isinstance(node.annotation, ast.Starred):
        yield line, "a starred annotation", "3.11"
    if isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Tuple) and not enclosed(node.type, lines):
        yield line, "several exceptions without parentheses", "3.14"
    if isinstance(node, ast.Try) or kind == "TryStar":
        for statement in node.finalbody:
            yield from ((found, "`continue` in `finally`", "3.8") for found in continues(statement))


def has_star(node):
    return isinstance(node, ast.Tuple) and any(isinstance(part, ast.Starred) for part in node.elts)


def is_plain_decorator(node):
    node = node.func if isinstance(node, ast.Call) else node
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def segment(node, lines):
    """A node's own text (its columns count bytes)."""
    first, last = node.lineno - 1, node.end_lineno - 1
    text = [line.encode() for line in lines[first:last + 1]]
    text[-1] = text[-1][:node.end_col_offset]
    text[0] = text[0][node.col_offset:]
    return b"".join(text).decode()


def stands_after(character, node, lines):
    return lines[node.lineno - 1].encode()[:node.col_offset].decode().rstrip().endswith(character)


def enclosed(node, lines):
    """Whether the tuple's own text stands in one pair of parentheses."""
    text = segment(node, lines)
    if not text.startswith("("):
        return False
    depth = 0
    reader = tokenize.generate_tokens(io.StringIO("(%s)" % text).readline)
    inner = [tok for tok in reader if tok.type == tokenize.OP][1:-1]
    for number, tok in enumerate(inner):
        depth += (tok.string in "([{") - (tok.string in ")]}")
        if not depth:
            return number == len(inner) - 1
    return False


def continues(node):
    if isinstance(node, ast.Continue):
        yield node.lineno
    elif not isinstance(node, (ast.ClassDef, *FUNCTIONS, *LOOPS)):
        for child in ast.iter_child_nodes(node):
            yield from continues(child)
    elif isinstance(node, LOOPS):
        for child in node.orelse:
            yield from continues(child)


def newer_contexts(tree, tokens):
    """`with (a as b, c as d):` differs from `with (a):` in words only, not in the tree."""
    words = [tok for tok in tokens if tok.type not in (tokenize.NL, tokenize.COMMENT)]
    statements = {node.lineno for node in ast.walk(tree) if isinstance(node, (ast.With, ast.AsyncWith))}
    for at, tok in enumerate(words[:-1]):
        if tok.string != "with" or tok.start[0] not in statements or words[at + 1].string != "(":
            continue
        depth, several = 0, False
        for number in range(at + 1, len(words)):
            text = words[number].string
            depth += (text in ("(", "[", "{")) - (text in (")", "]", "}"))
            several = several or depth == 1 and text in (",", "as")
            if not depth:
                if several and words[number + 1].string == ":":
                    yield tok.start[0], "`with` around parentheses", "3.9"
                break


def newer_f_strings(tokens, lines):
    for line, text in f_strings(tokens, lines):
        yield from newer_in_f_string(line, text)


def f_strings(tokens, lines):
    """(line, source text) of every f-string that is not part of another."""
    start, depth = None, 0
    for tok in tokens:
        kind = tokenize.tok_name[tok.type]
        if kind == "STRING" and not depth and "f" in re.match(r"\w*", tok.string)[0].lower():
            yield tok.start[0], tok.string
        elif kind == "FSTRING_START":
            start, depth = start if depth else tok.start, depth + 1
        elif kind == "FSTRING_END":
            depth -= 1
            if not depth:
                rows = lines[start[0] - 1:tok.end[0]]
                rows[-1] = rows[-1][:tok.end[1]]
                rows[0] = rows[0][start[1]:]
                yield start[0], "".join(rows)


def newer_in_f_string(line, text):
    prefix = re.match(r"\w*", text)[0]
    quote = re.match(r"\"\"\"|'''|\"|'", text[len(prefix):])[0]
    body = text[len(prefix) + len(quote):-len(quote)]
    for at, field in fields(body):
        here = line + text[:len(prefix) + len(quote)].count("\n") + body[:at].count("\n")
        expression, specification = split_field(field)
        if quote in expression or len(quote) == 1 and "\n" in expression:
            yield here, "its own quotes inside an f-string", "3.12"
        if "\\" in expression:
            yield here, "a backslash inside an f-string's braces", "3.12"
        if "#" in re.sub(r"'[^']*'|\"[^\"]*\"", "", expression):
            yield here, "a comment inside an f-string", "3.12"
        if re.search(r"(?<![=!<>])=\s*$", expression):
            yield here, "`=` in an f-string", "3.8"
        if "{" in specification:
            yield from newer_in_f_string(here, 'f"""%s"""' % specification)
        for inner in re.finditer(r"\b[rR]?[fF][rR]?(\"\"\"|'''|\"|').*?\1", expression, re.DOTALL):
            yield from newer_in_f_string(here, inner[0])


def fields(body):
    """(offset, text) of each replacement field, without its braces."""
    at = 0
    while at < len(body):
        if body[at] != "{":
            at += 1
        elif body.startswith("{{", at):
            at += 2
        else:
            end, depth, quoted = at + 1, 1, ""
            while end < len(body) and depth:
                character = body[end]
                if quoted:
                    quoted = "" if character == quoted else quoted
                elif character in "'\"":
                    quoted = character
                else:
                    depth += (character in "{[(") - (character in "}])")
                end += 1
            yield at, body[at + 1:end - 1]
            at = end


def split_field(field):
    """(expression, format specification): the `!r` goes with neither."""
    depth, quoted = 0, ""
    for at, character in enumerate(field):
        if quoted:
            quoted = "" if character == quoted else quoted
        elif character in "'\"":
            quoted = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif not depth and character == ":":
            return field[:at], field[at + 1:]
        elif not depth and character == "!" and field[at + 1:at + 2] != "=":
            return field[:at], field[at:].partition(":")[2]
    return field, ""


def awaits_in_odd_places(tree):
    """`await` and asynchronous loops where 3.6 does not know them."""
    problems = []

    def visit(node, is_async, in_string, in_plain):
        if isinstance(node, ast.Await) and in_string:
            problems.append((in_string, "`await` in an f-string: grammar of Python 3.7"))
        if isinstance(node, COMPREHENSIONS):
            here = any(part.is_async for part in node.generators)
            if here and not is_async:
                problems.append((node.lineno, "an asynchronous comprehension outside an asynchronous function: "
                                              "grammar of Python 3.8"))
            elif here and in_plain:
                problems.append((node.lineno, "an asynchronous comprehension inside another: grammar of Python 3.11"))
            in_plain = not here and not isinstance(node, ast.GeneratorExp)
        if isinstance(node, (ast.Lambda, *FUNCTIONS)):
            is_async, in_plain, in_string = isinstance(node, ast.AsyncFunctionDef), False, None
        if isinstance(node, ast.JoinedStr) and not in_string:
            in_string = node.lineno
        for child in ast.iter_child_nodes(node):
            visit(child, is_async, in_string, in_plain)
    visit(tree, False, None, False)
    return problems


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


@pytest.mark.parametrize("python", old_pythons())
def test_an_old_python_reads_the_whole_file(python):
    words = "import sys; compile(open(sys.argv[1], encoding='utf-8').read(), sys.argv[1], 'exec')"
    done = subprocess.run([python, "-c", words, HOUSE], stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()


# ── every rule, shown red ──────────────────────────────────────────────────────────────────

OPENING = "import sys\nif sys.version_info < (3, 9):\n    sys.exit(2)\n"
BANNER = "# %s\n# %%s\n#\n# What it owns, what it leaves to others.\n# %s" % ("═" * 79, "═" * 79)


def house(text, opening=OPENING):
    """A small house: `§ 2 · Config` stands for a banner, `#!` marks the line that must be named."""
    return opening + re.sub(r"(?m)^§ (.*)$", lambda found: BANNER % found[1], text.strip("\n")) + "\n"


def planted(case):
    return house(*case) if isinstance(case, tuple) else house(case)


def upstairs(use):
    return "§ 2 · Config\n%s\n§ 4 · Slurm\nclass Later:\n    pass\nlater = LATER = 4\n" % use


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
    "assets use something": "§ 1 · Basics\nx = 1\n§ 17 · Assets\nPAGE = '%s' % x  #!",
    "assets use a module": "§ 1 · Basics\nx = 1\n§ 17 · Assets\nPAGE = sys.path  #!",
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
    "an unknown number": "# %s\n# 18 · Attic  #!\n#\n# What.\n# %s" % ("═" * 20, "═" * 20),
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
    "a print below": "§ 7 · Wire\ndef f():\n    print('hello')  #!",
    "a print to stderr": "§ 7 · Wire\ndef f():\n    print('hello', file=sys.stderr)  #!",
    "an exit below": "§ 15 · Driver\ndef f():\n    sys.exit(3)  #!",
    "a SystemExit below": "§ 15 · Driver\ndef f():\n    raise SystemExit(3)  #!",
    # grammar
    "walrus": "§ 1 · Basics\nif (n := 3):  #!\n    pass",
    "positional-only": "§ 1 · Basics\ndef f(a, /, b):  #!\n    pass",
    "f-string =": "§ 1 · Basics\nx = 1\ny = f'{x=}'  #!",
    "f-string = with a format": "§ 1 · Basics\nx = 1\ny = f'{x = :>5}'  #!",
    "await in an f-string": "§ 1 · Basics\nasync def f(x):\n    return f'{await x}'  #!",
    "future annotations": ("§ 1 · Basics", "from __future__ import annotations  #!\n" + OPENING),
    "an asynchronous comprehension outside": "§ 1 · Basics\ndef f(x):\n    return (y async for y in x)  #!",
    "an asynchronous comprehension inside another":
        "§ 1 · Basics\nasync def f(x):\n    return [[y async for y in z] for z in x]  #!",
    "parenthesised with": "§ 1 · Basics\nwith (open('a') as a,  #!\n      open('b') as b):\n    pass",
    "parenthesised with, one item": "§ 1 · Basics\nwith (open('a') as a):  #!\n    pass",
    "a decorator with an index": "§ 1 · Basics\nx = []\n@x[0]  #!\ndef f():\n    pass",
    "a decorator in parentheses": "§ 1 · Basics\n@(len)  #!\ndef f():\n    pass",
    "a star in return": "§ 1 · Basics\ndef f(a):\n    return 1, *a  #!",
    "a star in return behind parentheses": "§ 1 · Basics\ndef f(a):\n    return (1), *a, (2)  #!",
    "a star in yield": "§ 1 · Basics\ndef f(a):\n    yield 1, *a  #!",
    "a star in for": "§ 1 · Basics\ndef f(a):\n    for x in 1, *a:  #!\n        pass",
    "an annotated bare tuple": "§ 1 · Basics\nx: tuple = 1, 2  #!",
    "continue in finally": "§ 1 · Basics\nfor x in 'ab':\n    try:\n        pass\n    finally:\n        continue  #!",
}
NEWER = {  # what the running Python itself may be too old to read: then its own complaint names the line
    (3, 10): {"match": "§ 1 · Basics\nmatch 1:  #!\n    case 1:\n        pass"},
    (3, 11): {"except*": "§ 1 · Basics\ntry:  #!\n    pass\nexcept* OSError:\n    pass",
              "a star in an index": "§ 1 · Basics\nx = {}\ny = (1, 2)\nz = x[0, *y]  #!"},
    (3, 12): {"type parameters": "§ 1 · Basics\ndef f[T](x):  #!\n    pass",
              "a type alias": "§ 1 · Basics\ntype X = int  #!",
              "the same quotes inside": "§ 1 · Basics\nx = {}\ny = f'{x['a']}'  #!",
              "a backslash inside": "§ 1 · Basics\nx = []\ny = f'{\"\\n\".join(x)}'  #!",
              "a backslash inside a format": "§ 1 · Basics\nx = []\ny = f'''\n{1:{\"\\n\".join(x)}}'''  #!"},
}
for since, more in NEWER.items():
    if sys.version_info >= since:
        PLANTED.update(more)


@pytest.mark.parametrize("rule", PLANTED)
def test_a_planted_violation_is_named_with_its_line(rule):
    source = planted(PLANTED[rule])
    marked = [number for number, line in enumerate(source.splitlines(), 1) if line.endswith("  #!")]
    source = source.replace("  #!", "")
    assert {line for line, _ in check(source)} == set(marked), check(source)


@pytest.mark.parametrize("python", [path for path in old_pythons() if "3.6" in path])
def test_the_grammar_rules_agree_with_a_real_3_6(python):
    words = ("import json, sys\nfor text in json.load(sys.stdin):\n    try:\n        compile(text, 'x', 'exec')\n"
             "        print('yes')\n    except SyntaxError:\n        print('no')\n")
    sources = [planted(text) for text in [*PLANTED.values(), *CLEAN.values()]]
    ruled = {source: "no" if any("grammar" in text for _, text in check(source)) else "yes" for source in sources}
    done = subprocess.run([python, "-c", words], input=json.dumps(list(ruled)).encode(), stdout=subprocess.PIPE)
    differing = [text for text, word in zip(ruled, done.stdout.decode().split()) if word != ruled[text]]
    assert not differing, "\n".join(differing)


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
    "downstairs": "§ 1 · Basics\nx = 1\n§ 7 · Wire\ndef f(y: 'x' = x):\n    return x",
    "an asset": "§ 1 · Basics\ndef f():\n    return PAGE\n§ 17 · Assets\nPAGE = 'text'\nTWICE = PAGE * 2",
    "the final call": "§ 16 · Commands\ndef main():\n    return 0\n§ 17 · Assets\nPAGE = ''\n"
                      "if __name__ == '__main__':\n    sys.exit(main())",
    "a bar inside a text": "§ 17 · Assets\nPAGE = '''\n# %s\n# 1 · Basics\n'''" % ("═" * 20),
    "a long table": "§ 1 · Basics\nTABLE = {\n" + "    'a': 1,\n" * 80 + "}",
    "guests in a function": "§ 2 · Config\ndef f():\n    try:\n        import tomllib\n    except ImportError:\n"
                            "        from pip._vendor import tomli as tomllib\n    import requests, json\n"
                            "    return tomllib, requests, json",
    "guests in a loop over their names":
        "§ 2 · Config\ndef f():\n    for name in ('tomllib', 'pip._vendor.tomli'):\n        return __import__(name)",
    "a command prints and exits": "§ 16 · Commands\ndef f():\n    print('hello')\n    sys.exit(1)",
    "print to a stream that was passed": "§ 7 · Wire\ndef f(out):\n    print('a', file=out)\n    out.write('b')",
    "os._exit": ("§ 8 · Nodes\ndef f():\n    os._exit(1)", OPENING + "import os\n"),
    "os and sys before the check": ("§ 1 · Basics", "import os\n" + OPENING),
    "os.environ and an object's own fields": (
        "§ 1 · Basics\ndef f(self):\n    os.environ['a'] = 'b'\n    self.x = {}\n    self.x['y'] = 1",
        OPENING + "import os\n"),
    "old grammar that looks new": """
§ 1 · Basics
async def f(x, *y, z: 'int | None' = None, **k) -> 'dict[str, int]':
    with (open('a')) as a, open('b') as b:
        print(f'{a!r:>{z}} {{x=}} {x != y} {x == y} {k["a"]:%H:%M} {x:=^5}', file=b)
    with (open('c')):
        pass
    async with x as one, x as two:
        pass
    for n in (1, *y):
        try:
            pass
        finally:
            for m in 'ab':
                continue
    return [(await v) async for v in x], (1, *y), {**k, 'a': 1}, x[(*y, 1)], 1_000
def g(*a):
    yield (1, *a)
    yield from a
    x: tuple = (1, 2)
    return (1, *x)
@g.x.y(1)
def h():
    pass
""",
}


@pytest.mark.parametrize("case", CLEAN)
def test_what_is_allowed_raises_no_alarm(case):
    assert check(planted(CLEAN[case])) == []


def test_the_table_shows_each_section_beside_its_budget():
    text = table(house("§ 1 · Basics\nx = 1\n§ 17 · Assets\n" + "PAGE = 1\n" * 400))
    assert "1 · Basics                6    150\n" in text and "over by 55" in text
    assert text.splitlines()[-1].split()[0] == "all"


if __name__ == "__main__":
    house_source = read_house()
    print(table(house_source))
    found = check(house_source)
    for at, words in found:
        print("llmrun.py:%d: %s" % (at, words))
    sys.exit(bool(found))

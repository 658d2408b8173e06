"""As much of bitbake as the layer's recipe needs, for tests/lab/yocto.rs:

bitbake.py SETTINGS get NAME...     prints the variables' values as JSON
bitbake.py SETTINGS run FUNCTION    runs a function of the recipe

SETTINGS are variables as JSON, as local.conf would have them. A line that isn't understood is an error.
"""

import glob
import json
import os
import re
import subprocess
import sys
import types

LAYER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../yocto")
ASSIGNMENT = re.compile(r'(?:export )?(\S+?(?:\[[^]]+\])?) (=|:=|\?=|\?\?=|\+=|\.=) "([^"]*)"')
FUNCTION = re.compile(r"(python )?(\w+)\(\) \{")
OTHER = re.compile(r"#|(inherit|addtask) ")


class Data:
    def __init__(self, settings):
        self.values = dict(settings)
        self.functions = {}
        self.helpers = {}

    def getVar(self, name):
        value = self.values.get(name)
        if value is None:
            return None
        return self.expand(value + self.values.get(name + ":append", ""))

    def expand(self, text):
        def variable(match):
            value = self.getVar(match.group(1))
            return match.group(0) if value is None else value

        text = re.sub(r"\$\{([\w:.+-]+)\}", variable, text)
        return re.sub(r"\$\{@(.+?)\}", lambda match: str(eval(match.group(1), self.names())), text)

    def names(self):
        return {"d": self, "bb": BB, "os": os, **self.helpers}

    def assign(self, name, operator, value):
        name = self.expand(name)
        if operator in ("?=", "??="):
            self.values.setdefault(name, value)
        elif operator == "+=":
            self.values[name] = f"{self.values.get(name, '')} {value}"
        elif operator == ".=":
            self.values[name] = self.values.get(name, "") + value
        else:
            self.values[name] = self.expand(value) if operator == ":=" else value

    def read(self, path):
        with open(path) as file:
            lines = iter(file.read().replace("\\\n", "").splitlines())
        for line in lines:
            assignment, function = ASSIGNMENT.fullmatch(line), FUNCTION.fullmatch(line)
            if assignment:
                self.assign(*assignment.groups())
            elif function:
                python, name = function.groups()
                self.functions[name] = (bool(python), "\n".join(iter(lambda: next(lines), "}")) + "\n")
            elif line.startswith("def "):
                body = "\n".join([line, *iter(lambda: next(lines), "")])
                exec(body, {"os": os}, self.helpers)
            elif line.startswith("require "):
                self.read(os.path.join(os.path.dirname(path), self.expand(line.split()[1])))
            elif line and not OTHER.match(line):
                sys.exit(f"{path}: what is this? {line}")

    def run(self, name):
        python, body = self.functions[name]
        if python:
            exec(f"def function():\n{body}", globals := self.names())
            globals["function"]()
            return
        body = self.expand(body)
        if "${" in body:
            sys.exit(f"{name}: not all is known of\n{body}")
        sys.exit(subprocess.run(["sh", "-e", "-c", body]).returncode)


def contains(name, wanted, yes, no, d):
    return yes if set(wanted.split()) <= set((d.getVar(name) or "").split()) else no


def filter_(name, wanted, d):
    return " ".join(word for word in (d.getVar(name) or "").split() if word in wanted.split())


def vercmp_string_op(one, other, op):
    one, other = ([int(part) for part in version.split(".") if part] for version in (one, other))
    return {">=": one >= other}[op]


def fatal(message):
    sys.exit(f"FATAL: {message}")


UTILS = types.SimpleNamespace(contains=contains, filter=filter_, vercmp_string_op=vercmp_string_op)
BB = types.SimpleNamespace(fatal=fatal, utils=UTILS)


def main():
    [recipe] = glob.glob(os.path.join(LAYER, "recipes-*/*/*.bb"))
    name, version = os.path.basename(recipe)[: -len(".bb")].split("_")
    data = Data(json.loads(sys.argv[1]))
    data.values.update({"PN": name, "BPN": name, "PV": version, "BP": "${BPN}-${PV}", "LAYERDIR": LAYER})
    data.values["AUTOREV"] = "AUTOINC"
    data.read(os.path.join(LAYER, "conf/layer.conf"))
    data.read(recipe)
    if sys.argv[2] == "get":
        print(json.dumps({name: data.getVar(name) for name in sys.argv[3:]}))
    else:
        data.run(sys.argv[3])


main()

//! What a module must be before it is loaded.
//!
//! | checked | why |
//! | --- | --- |
//! | nothing from modpost, only the expected from objtool | missing symbols; code the unwinder or the mitigations cannot follow |
//! | no vector registers | the kernel does not save them |
//! | stack frames | a kernel stack has 16 KiB, shared with all callers and an interrupt |
//! | recursion | its depth must have a bound, and somebody must have thought about it |
//!
//! Frames and calls are read from the disassembly. Calls through pointers are not seen, so a cycle
//! that passes through a trait object is not found.

use super::setup::BuildRoot;
use super::{capture, say};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Largest frame, in bytes.
const FRAME_MAX: u64 = 2048;
/// Frames larger than this are listed.
const FRAME_LISTED: u64 = 1024;

/// Functions with a larger frame than others may have, and why that is bearable. Parts of demangled
/// names.
const LARGE_FRAMES: &[(&str, u64, &str)] =
    &[("core::slice::sort::shared::smallsort::", 2560, "calls nothing but a comparison")];

/// Functions that may call themselves, and what bounds the depth. Parts of demangled names.
const BOUNDED_RECURSION: &[(&str, &str)] = &[
    ("blake3::compress_subtree_wide", "halves its input; and is not called, see platform::blake3"),
    ("core::slice::sort::", "turns to heapsort at 2 log2 of the length"),
    ("BTreeMap<_, _, _> as core::clone::Clone>::clone::clone_subtree", "the height of the map"),
    ("fs_core::engine::data::place", "once: stores plainly what was to be packed"),
];

/// Functions that never return although objtool does not know. What follows a call of one of them
/// is another function, which objtool takes for "falling through".
const NEVER_RETURN: &[&str] = &[
    "alloc::alloc::handle_alloc_error",
    "alloc::raw_vec::capacity_overflow",
    "alloc::raw_vec::handle_error",
    "core::num::int_log10::panic_for_nonpositive_argument",
    "core::option::expect_failed",
    "core::option::unwrap_failed",
    "core::panicking::",
    "core::result::unwrap_failed",
    "core::slice::index::",
    "core::slice::sort::shared::smallsort::panic_on_ord_violation",
];

/// Checks a module and what was said when it was linked.
///
/// # Errors
/// All that is wrong with it.
pub fn pass(root: &BuildRoot, module: &Path, said: &str) -> Result<(), String> {
    let mut disassemble = root.command("llvm-objdump");
    disassemble.args(["--disassemble", "--reloc", "--no-show-raw-insn"]);
    let code = Code::parse(&capture(disassemble.arg(module))?);
    let names = demangle(root, &code)?;
    let mut wrong: Vec<String> =
        said.lines().filter(|line| is_complaint(line, &code, &names)).map(str::to_owned).collect();
    wrong.extend(code.vectors().map(|name| format!("{} uses vector registers", names[name])));
    let mut frames: Vec<(u64, &str)> = code.frames().collect();
    frames.sort_unstable_by(|a, b| b.cmp(a));
    for (bytes, name) in frames.iter().filter(|(bytes, _)| *bytes > FRAME_LISTED) {
        let name = &names[*name];
        let line = format!("{bytes} bytes of stack in {name}");
        let special = LARGE_FRAMES.iter().find(|(part, _, _)| name.contains(part));
        if *bytes > special.map_or(FRAME_MAX, |(_, most, _)| *most) {
            wrong.push(line);
        } else {
            say(&line);
        }
    }
    for cycle in code.cycles() {
        let is_bounded = |name: &&str| {
            BOUNDED_RECURSION.iter().any(|(bounded, _)| names[*name].contains(bounded))
        };
        if !cycle.iter().any(is_bounded) {
            let shown: Vec<&str> = cycle.iter().map(|name| names[*name].as_str()).collect();
            wrong.push(format!("recursion without a known bound: {}", shown.join(", ")));
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    Err(format!("{} must not be loaded:\n  {}", module.display(), wrong.join("\n  ")))
}

/// Whether a line of the build must not be there.
fn is_complaint(line: &str, code: &Code, names: &BTreeMap<&str, String>) -> bool {
    let Some((_, words)) = line.split_once("objtool: ") else {
        return line.contains("modpost:");
    };
    if words.ends_with("symbol name too long, can't create __pfx_ symbol") {
        return false;
    }
    let falling = words.split_once("() falls through to next function");
    let last = falling.and_then(|(name, _)| code.functions.get(name)?.calls.last());
    let last = last.and_then(|name| names.get(name.as_str()));
    !last.is_some_and(|name| NEVER_RETURN.iter().any(|part| name.contains(part)))
}

/// The readable names of all functions.
fn demangle<'a>(root: &BuildRoot, code: &'a Code) -> Result<BTreeMap<&'a str, String>, String> {
    let mut names = BTreeMap::new();
    let called = code.functions.values().flat_map(|function| &function.calls);
    let all: BTreeSet<&str> =
        code.functions.keys().chain(called).map(String::as_str).filter(|s| !s.is_empty()).collect();
    let mangled: Vec<&str> = all.into_iter().collect();
    for some in mangled.chunks(500) {
        let shown = capture(root.command("llvm-cxxfilt").args(some))?;
        names.extend(some.iter().copied().zip(shown.lines().map(str::to_owned)));
    }
    Ok(names)
}

/// One function of the disassembly.
#[derive(Debug, Default)]
struct Function {
    frame: u64,
    calls: Vec<String>,
    has_vectors: bool,
}

/// A disassembled module, by function name.
#[derive(Debug, Default)]
struct Code {
    functions: BTreeMap<String, Function>,
}

impl Code {
    fn parse(text: &str) -> Code {
        let mut code = Code::default();
        let mut current = String::new();
        let mut function = Function::default();
        // Where the last instruction jumps to, unless a relocation on the next line says better.
        let mut target: Option<String> = None;
        for line in text.lines() {
            if let Some(name) = header(line) {
                function.calls.extend(target.take());
                code.add(
                    std::mem::replace(&mut current, name.to_owned()),
                    std::mem::take(&mut function),
                );
            } else if line.contains("R_X86_64_PLT32") || line.contains("R_X86_64_PC32") {
                if target.take().is_some() {
                    function.calls.extend(relocation(line).map(str::to_owned));
                }
            } else if let Some((_, instruction)) = line.split_once(':') {
                function.calls.extend(target.take());
                target = function.read(instruction.trim(), &current);
            }
        }
        function.calls.extend(target.take());
        code.add(current, function);
        code
    }

    fn add(&mut self, name: String, function: Function) {
        if !name.is_empty() {
            self.functions.insert(name, function);
        }
    }

    fn vectors(&self) -> impl Iterator<Item = &str> {
        self.functions.iter().filter(|(_, f)| f.has_vectors).map(|(name, _)| name.as_str())
    }

    fn frames(&self) -> impl Iterator<Item = (u64, &str)> {
        self.functions.iter().map(|(name, function)| (function.frame, name.as_str()))
    }

    /// The sets of functions that can come back to themselves by direct calls.
    fn cycles(&self) -> Vec<Vec<&str>> {
        let names: Vec<&str> = self.functions.keys().map(String::as_str).collect();
        let index: BTreeMap<&str, usize> = names.iter().copied().zip(0..).collect();
        let edges: Vec<Vec<usize>> = self
            .functions
            .values()
            .map(|f| f.calls.iter().filter_map(|name| index.get(name.as_str()).copied()).collect())
            .collect();
        let components = strong_components(&edges);
        let mut cycles: Vec<Vec<&str>> = components
            .into_iter()
            .filter(|nodes| nodes.len() > 1 || edges[nodes[0]].contains(&nodes[0]))
            .map(|nodes| nodes.into_iter().map(|node| names[node]).collect())
            .collect();
        cycles.iter_mut().for_each(|cycle| cycle.sort_unstable());
        cycles.sort();
        cycles
    }
}

impl Function {
    /// Takes in one instruction; returns what it calls or jumps to.
    fn read(&mut self, instruction: &str, own: &str) -> Option<String> {
        let (what, operands) =
            instruction.split_once(char::is_whitespace).unwrap_or((instruction, ""));
        let operands = operands.split('#').next().unwrap_or_default().trim();
        self.has_vectors |= ["%xmm", "%ymm", "%zmm"].iter().any(|name| operands.contains(name));
        if what.starts_with("push") {
            self.frame += 8;
        } else if what.starts_with("sub") {
            if let Some(bytes) = operands.strip_prefix('$').and_then(|s| s.strip_suffix(", %rsp")) {
                self.frame += number(bytes);
            }
        } else if what.starts_with("call") || what.starts_with('j') {
            let place = operands.split_once('<').map(|(_, name)| name.trim_end_matches('>'))?;
            let (name, offset) = place.split_once('+').unwrap_or((place, ""));
            // A jump within the function is no call, unless a relocation names its real target.
            return Some(if name == own && !offset.is_empty() {
                String::new()
            } else {
                name.to_owned()
            });
        }
        None
    }
}

/// The name in a line that begins a function.
fn header(line: &str) -> Option<&str> {
    let (address, rest) = line.split_once(" <")?;
    let is_address = address.len() == 16 && address.bytes().all(|byte| byte.is_ascii_hexdigit());
    rest.strip_suffix(">:").filter(|_| is_address)
}

/// The symbol in a relocation's line.
fn relocation(line: &str) -> Option<&str> {
    let symbol = line.split_whitespace().last()?;
    Some(symbol.split_once("-0x").map_or(symbol, |(name, _)| name))
}

fn number(text: &str) -> u64 {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    }
    .unwrap_or(0)
}

/// Tarjan's algorithm, with its stack of calls kept by hand.
fn strong_components(edges: &[Vec<usize>]) -> Vec<Vec<usize>> {
    const NEW: usize = usize::MAX;
    let mut order = vec![NEW; edges.len()];
    let mut low = vec![0; edges.len()];
    let mut is_open = vec![false; edges.len()];
    let (mut open, mut path, mut components) = (Vec::new(), Vec::new(), Vec::new());
    let mut count = 0;
    for root in 0..edges.len() {
        if order[root] == NEW {
            path.push((root, 0));
        }
        while let Some((node, next)) = path.pop() {
            if next == 0 {
                (order[node], low[node]) = (count, count);
                count += 1;
                open.push(node);
                is_open[node] = true;
            } else {
                let child = edges[node][next - 1];
                if is_open[child] {
                    low[node] = low[node].min(low[child]);
                }
            }
            if let Some(&child) = edges[node].get(next) {
                path.push((node, next + 1));
                if order[child] == NEW {
                    path.push((child, 0));
                }
            } else if low[node] == order[node] {
                let begin = open.iter().rposition(|&other| other == node).unwrap_or(0);
                let component = open.split_off(begin);
                component.iter().for_each(|&other| is_open[other] = false);
                components.push(component);
            }
        }
    }
    components
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTING: &str = "
cairn.ko:\tfile format elf64-x86-64

Disassembly of section .text:

0000000000000010 <outer>:
      10:      \tendbr64
      14:      \tcallq\t0x19 <outer+0x9>
\t\t0000000000000015:  R_X86_64_PLT32\t__fentry__-0x4
      19:      \tpushq\t%rbp
      1a:      \tsubq\t$0x1b8, %rsp           # imm = 0x1B8
      21:      \tje\t0x19 <outer+0x9>
      23:      \tcallq\t0x50 <inner>
      28:      \tjmp\t0x2d <outer+0x1d>
\t\t0000000000000029:  R_X86_64_PLT32\t__x86_return_thunk-0x4

0000000000000050 <inner>:
      50:      \tsubq\t$16, %rsp
      54:      \tcallq\t0x59 <inner+0x9>
\t\t0000000000000055:  R_X86_64_PLT32\touter-0x4
      59:      \tmovaps\t%xmm0, (%rsp)

0000000000000090 <alone>:
      90:      \tcallq\t*%rax
      92:      \tjmp\t0x10 <outer>
";

    #[test]
    fn frames_calls_and_vector_registers_are_read_from_a_listing() {
        let code = Code::parse(LISTING);
        let frames: Vec<_> = code.frames().collect();
        assert_eq!(frames, [(0, "alone"), (16, "inner"), (0x1c0, "outer")]);
        assert_eq!(code.vectors().collect::<Vec<_>>(), ["inner"]);
        let calls: Vec<&str> = code.functions["outer"]
            .calls
            .iter()
            .map(String::as_str)
            .filter(|s| !s.is_empty())
            .collect();
        assert_eq!(calls, ["__fentry__", "inner", "__x86_return_thunk"]);
    }

    #[test]
    fn functions_that_reach_themselves_are_cycles_and_others_are_not() {
        let code = Code::parse(LISTING);
        assert_eq!(code.cycles(), [["inner", "outer"]]);
    }

    #[test]
    fn components_are_found_in_a_graph_of_two_loops_and_a_bridge() {
        let edges = [vec![1], vec![2], vec![0, 3], vec![4], vec![3, 5], vec![]];
        let mut found = strong_components(&edges);
        found.iter_mut().for_each(|nodes| nodes.sort_unstable());
        found.sort();
        assert_eq!(found, [vec![0, 1, 2], vec![3, 4], vec![5]]);
    }

    #[test]
    fn of_what_the_linkers_tools_say_only_the_expected_is_let_pass() {
        let mut code = Code::default();
        for (name, last) in [("f", "divided"), ("g", "other")] {
            code.add(name.into(), Function { calls: vec![last.into()], ..Function::default() });
        }
        let names: BTreeMap<&str, String> = [
            ("divided", "core::panicking::panic_const::panic_const_div_by_zero".to_owned()),
            ("other", "fs_core::other".to_owned()),
        ]
        .into();
        let is_wrong = |line: &str| is_complaint(line, &code, &names);
        assert!(!is_wrong("a.o: warning: objtool: f() falls through to next function g()"));
        assert!(is_wrong("a.o: warning: objtool: g() falls through to next function h()"));
        assert!(is_wrong("a.o: warning: objtool: h() falls through to next function i()"));
        assert!(is_wrong("a.o: warning: objtool: f+0x7: unreachable instruction"));
        assert!(is_wrong("ERROR: modpost: \"__udivti3\" [a.ko] undefined!"));
        assert!(!is_wrong("  LD [M] a.ko"));
    }
}

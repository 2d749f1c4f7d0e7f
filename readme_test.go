package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// forEachREADME runs a test with the text of each README.
func forEachREADME(t *testing.T, test func(t *testing.T, text string)) {
	for _, name := range []string{"README.md", "README.zh-CN.md"} {
		text, err := os.ReadFile(name)
		must(t, err)
		t.Run(name, func(t *testing.T) { test(t, string(text)) })
	}
}

// named returns what the groups of a pattern match in text, at least once.
func named(t *testing.T, text, pattern string) (all []string) {
	t.Helper()
	for _, match := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
		all = append(all, strings.Join(match[1:], ""))
	}
	if len(all) == 0 {
		t.Fatalf("nothing matches %s", pattern)
	}
	return all
}

// among complains of each name that is not known.
func among(t *testing.T, known, names []string, complaint string) {
	t.Helper()
	for _, name := range names {
		if !slices.Contains(known, name) {
			t.Errorf("%s %q", complaint, name)
		}
	}
}

func TestREADMENamesTheSettingsThatExist(t *testing.T) {
	forEachREADME(t, func(t *testing.T, text string) {
		var envs []string
		flags := []string{"demo", "json"} // -json is of check
		for _, s := range new(config).settings() {
			row := regexp.MustCompile("(?m)^\\|[^|]*`" + s.env + "`[^|]*\\|[^|]*" + strings.Replace("`-"+s.flag+"`", "`-`", "", 1) + "[^|]*\\|")
			if !row.MatchString(text) {
				t.Errorf("%s is not in the table of settings", s.env)
			}
			envs, flags = append(envs, s.env), append(flags, s.flag)
		}
		among(t, envs, named(t, text, "`([A-Z]{4,})[`=]|\\b([A-Z]+_[A-Z_]+)\\b"), "there is no setting")
		among(t, flags, named(t, text, "`-([a-z-]+)"), "there is no flag")
	})
}

// TestREADMEGivesCommandsThatAreUnderstood has the program parse each command
// line; -h, at its end, lets it do no more.
func TestREADMEGivesCommandsThatAreUnderstood(t *testing.T) {
	wxscan := build(t)
	forEachREADME(t, func(t *testing.T, text string) {
		for _, args := range named(t, text, `(?m)(?:go run \.|[^-\w/]\./wxscan)((?: [^\s|`+"`"+`]+)*)`) {
			if out, err := exec.Command("sh", "-c", wxscan+args+" -h").CombinedOutput(); err != nil {
				t.Errorf("wxscan%s: %v, %s", args, err, out)
			}
		}
	})
}

func TestREADMENamesPathsThatAreAnswered(t *testing.T) {
	w := newWorld(t)
	forEachREADME(t, func(t *testing.T, text string) {
		for _, call := range named(t, text, `((?:GET|POST) /(?:[\w./]*\w)?)|(/(?:wechat|static|demo)/[\w./]*\w|/healthz|/metrics)`) {
			method, path, ok := strings.Cut(call, " ")
			if !ok {
				method, path = "GET", call
			}
			out := w.do(method, path, "")
			unknown := out.Code == 404 && (strings.HasPrefix(path, "/static/") || strings.Contains(out.Body.String(), "page not found"))
			if unknown || out.Code == 405 && ok {
				t.Errorf("%s %s: %d %s", method, path, out.Code, out.Body)
			}
		}
	})
}

// TestREADMENamesTheFieldsThatAreAnswered holds for JSON fields both ways. What
// else the section on the interface names must be a word of the program's.
func TestREADMENamesTheFieldsThatAreAnswered(t *testing.T) {
	read := func(file string) string {
		text, err := os.ReadFile(file)
		must(t, err)
		return string(text)
	}
	fields := named(t, read("handlers.go")+read("store.go"), `json:"(\w+)`)
	literals := named(t, read("handlers.go")+read("store.go")+read("demo.go"), `"(\w+)"`)
	forEachREADME(t, func(t *testing.T, text string) {
		_, text, _ = strings.Cut(text, "| `GET /wechat/getloginqr` |")
		text, _, _ = strings.Cut(text, "\n## ")
		objects := strings.Join(named(t, text, "`\\{([^`]*)`"), ",")
		inJSON := named(t, regexp.MustCompile(`:"[^"]*"`).ReplaceAllString(objects, ""), `"(\w+)"`)
		words := named(t, text, "`\"?([a-z]\\w*)\"?`|\"status\":\"(\\w+)\"")
		among(t, fields, inJSON, "no answer has a field")
		among(t, slices.Concat(fields, literals), words, "nothing is called")
		among(t, slices.Concat(inJSON, words), fields, "no word of the field")
	})
}

func TestREADMENamesFilesThatExist(t *testing.T) {
	forEachREADME(t, func(t *testing.T, text string) {
		for _, file := range named(t, text, `\]\(([^:)]+)\)|(deploy/[\w.]+\w|README[\w.-]*\.md|\.ci/\w+)`) {
			if _, err := os.Stat(file); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestREADMEsLinkEachOtherAndHoldTheSameCode(t *testing.T) {
	var code [][]string
	forEachREADME(t, func(t *testing.T, text string) {
		named(t, text, `\[(?:中文\]\(README\.zh-CN|English\]\(README)\.md\)`)
		code = append(code, named(t, text, "(?ms)^```((?:sh|go|js|html)\n.*?)^```"))
	})
	if !slices.Equal(code[0], code[1]) {
		t.Errorf("the code differs: %q and %q", code[0], code[1])
	}
}

func TestREADMELogsInFromTheShell(t *testing.T) {
	program(t, "curl", "curl")
	base, _, _ := start(t, none, "-demo", "-addr", "127.0.0.1:0")
	forEachREADME(t, func(t *testing.T, text string) {
		smoke := filepath.Join(t.TempDir(), "smoke.sh")
		must(t, os.WriteFile(smoke, []byte(named(t, text, "(?ms)^```sh\n(set -eu\n.*?)^```")[0]), 0o600))
		want := named(t, text, "`(\\{\"login\":true[^`…]*)`")[0]
		for _, flow := range []string{"", "getauthqr"} {
			cmd := exec.CommandContext(t.Context(), "sh", smoke, flow)
			cmd.Env = append(os.Environ(), "B="+base)
			out, err := cmd.CombinedOutput()
			lines := strings.Split(strings.TrimSpace(string(out)), "\n")
			if last := lines[len(lines)-1]; err != nil || !strings.HasPrefix(last, want) {
				t.Errorf("flow %q: %v, %s; want %s", flow, err, last, want)
			}
		}
	})
}

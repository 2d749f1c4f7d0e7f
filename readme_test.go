package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
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

func TestREADMENamesTheSettingsThatExist(t *testing.T) {
	forEachREADME(t, func(t *testing.T, text string) {
		envs, flags := named(t, text, "`([A-Z]{4,})[`=]|\\b([A-Z]+_[A-Z_]+)\\b"), named(t, text, "`-([a-z-]+)")
		knownEnvs, knownFlags := []string{}, []string{"demo", "json"} // -json is of check
		for _, s := range new(config).settings() {
			row := regexp.MustCompile("(?m)^\\|[^|]*`" + s.env + "`[^|]*\\|[^|]*" + strings.Replace("`-"+s.flag+"`", "`-`", "", 1) + "[^|]*\\|")
			if !row.MatchString(text) {
				t.Errorf("%s is not in the table of settings", &s)
			}
			knownEnvs, knownFlags = append(knownEnvs, s.env), append(knownFlags, s.flag)
		}
		for _, env := range envs {
			if !slices.Contains(knownEnvs, env) {
				t.Errorf("there is no setting %s", env)
			}
		}
		for _, flag := range flags {
			if !slices.Contains(knownFlags, flag) {
				t.Errorf("there is no flag -%s", flag)
			}
		}
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
		for _, call := range named(t, text, `((?:GET|POST) )?(/(?:wechat|static|demo)/[\w./]*\w|/healthz|/metrics)`) {
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
// else stands in the table of the interface must stand in the program too.
func TestREADMENamesTheFieldsThatAreAnswered(t *testing.T) {
	w, fields := newWorld(t, "WECHAT_SCOPE=snsapi_userinfo"), map[string]any{}
	for _, answer := range []any{qrAnswer{}, pollAnswer{}} {
		for field := range reflect.TypeOf(answer).Fields() {
			name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
			fields[name] = nil
		}
	}
	qr := w.begin(t, "getauthqr")
	w.scan(qr.Ticket, "alice", "allow")
	must(t, json.Unmarshal(w.sessionOf("Authorization", "Bearer "+w.check(t, qr.Ticket, "").Token).Body.Bytes(), &fields))
	w.setFault(func(rw http.ResponseWriter, r *http.Request) bool { rw.Write([]byte(`{"errcode":40164}`)); return true })
	must(t, json.Unmarshal(w.do("GET", "/wechat/getloginqr", "").Body.Bytes(), &fields))
	var code strings.Builder
	for _, name := range []string{"handlers.go", "store.go", "demo.go"} {
		text, err := os.ReadFile(name)
		must(t, err)
		code.Write(text)
	}
	forEachREADME(t, func(t *testing.T, text string) {
		_, text, _ = strings.Cut(text, "| `GET /wechat/getloginqr` |")
		text, _, _ = strings.Cut(text, "\n## ")
		var inJSON []string
		for _, object := range named(t, text, "`(\\{[^`]*)`") {
			object = regexp.MustCompile(`:"[^"]*"`).ReplaceAllString(object, "")
			inJSON = append(inJSON, named(t, object, `"(\w+)"`)...)
		}
		words := named(t, text, "`\"?([a-zA-Z_]+)\"?`|\"status\":\"(\\w+)\"")
		for _, name := range inJSON {
			if _, ok := fields[name]; !ok {
				t.Errorf("no answer has a field %q", name)
			}
		}
		for _, word := range words {
			if _, ok := fields[word]; !ok && !strings.Contains(code.String(), `"`+word+`"`) && word != "GET" && word != "CONFIRM" {
				t.Errorf("nothing is called %q", word)
			}
		}
		for name := range fields {
			if !slices.Contains(inJSON, name) && !slices.Contains(words, name) {
				t.Errorf("no word of the field %q", name)
			}
		}
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

func TestREADMEsLinkEachOtherAndHoldTheSameCommands(t *testing.T) {
	english, err := os.ReadFile("README.md")
	must(t, err)
	chinese, err := os.ReadFile("README.zh-CN.md")
	must(t, err)
	if !strings.Contains(string(english), "[中文](README.zh-CN.md)") || !strings.Contains(string(chinese), "[English](README.md)") {
		t.Error("a README does not link the other")
	}
	const block = "(?ms)^```((?:sh|go|js|html)\n.*?)^```"
	if a, b := named(t, string(english), block), named(t, string(chinese), block); !slices.Equal(a, b) {
		t.Errorf("the code differs: %q and %q", a, b)
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

var _ = httptest.NewRequest

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

var goodSettings = []string{
	"WECHAT_APPID=wx0123456789abcdef", "WECHAT_APPSECRET=0123456789abcdef0123456789abcdef",
	"WECHAT_TOKEN=token123", "PUBLIC_URL=https://login.example.com",
}

// only returns an environment of the given settings, each NAME=value: the first
// of a name counts.
func only(settings ...string) func(string) string {
	return func(name string) string {
		for _, setting := range settings {
			if value, ok := strings.CutPrefix(setting, name+"="); ok {
				return value
			}
		}
		return ""
	}
}

// with returns an environment: the good settings, changed by NAME=value.
func with(changes ...string) func(string) string {
	return only(slices.Concat(changes, goodSettings)...)
}

func none(string) string { return "" }

func TestASettingThatIsWrongIsNamedInOneLine(t *testing.T) {
	ended, end := context.WithCancel(t.Context())
	end() // so that a setting that is taken serves nobody
	const hidden = "got something else, which is not shown here"
	for _, test := range []struct {
		name  string
		wrong []string // settings, or else arguments
		got   string   // how the line ends; by default as the value given
	}{
		{"WECHAT_APPID", []string{"WECHAT_APPID=gh_97417a04a28d"}, `got "gh_97417a04a28d"`},
		{"WECHAT_APPSECRET", []string{"WECHAT_APPSECRET=hush hush"}, hidden},
		{"WECHAT_TOKEN", []string{"WECHAT_TOKEN=hush-hush", "WECHAT_TOKEN=ab",
			"WECHAT_TOKEN=" + strings.Repeat("a", 33)}, hidden},
		{"WECHAT_AES_KEY", []string{"WECHAT_AES_KEY=short"}, hidden},
		{"SESSION_SECRET", []string{"SESSION_SECRET=hush-hush-too-short", "SESSION_SECRET=" + secretA + ","}, hidden},
		{"METRICS_TOKEN", []string{"METRICS_TOKEN=hush hush"}, hidden},
		{"PUBLIC_URL (-url)", []string{"PUBLIC_URL=login.example.com", "PUBLIC_URL=https://login.example.com/wechat",
			"PUBLIC_URL=https://login.example.com?x", "PUBLIC_URL=https://u:p@login.example.com",
			"PUBLIC_URL=https://login.example.com\n"}, ""},
		{"PUBLIC_URL (-url)", []string{"-url ftp://x"}, `got "ftp://x"`},
		{"TICKET_TTL (-ttl)", []string{"TICKET_TTL=5", "TICKET_TTL=1500ms", "TICKET_TTL=721h"}, ""},
		{"TICKET_TTL (-ttl)", []string{"-ttl 0s"}, `got "0s"`},
		{"MAX_TICKETS (-max-tickets)", []string{"MAX_TICKETS=many", "MAX_TICKETS=0"}, ""},
		{"WECHAT_SCOPE (-scope)", []string{"WECHAT_SCOPE=snsapi_login"}, ""},
		{"WECHAT_API_BASE", []string{"WECHAT_API_BASE=api.weixin.qq.com"}, ""},
		{"WECHAT_OPEN_BASE", []string{"WECHAT_OPEN_BASE=https://a b"}, ""},
		{"WECHAT_MP_BASE", []string{"WECHAT_MP_BASE=x"}, ""},
		{"SESSION_TTL (-session-ttl)", []string{"SESSION_TTL=1s"}, ""},
		{"FLOWS (-flows)", []string{"FLOWS=scan,scan", "FLOWS=codes,scan", "FLOWS=scan,"}, ""},
		{"SITE_NAME (-site-name)", []string{"SITE_NAME=" + strings.Repeat("长", 41)}, ""},
		{"CONFIRM (-confirm)", []string{"CONFIRM=maybe"},
			`must be true or false: whether the phone must confirm a scan, got "maybe"`},
		{"ALLOWED_ORIGINS (-allowed-origins)",
			[]string{"ALLOWED_ORIGINS=*", "ALLOWED_ORIGINS=https://a.example.com/,https://b.example.com"}, ""},
		{"WECHAT_VERIFY_FILE (-verify-file)", []string{"WECHAT_VERIFY_FILE=../MP_verify_x.txt"}, ""},
		{"PUSH_MAX_SKEW (-push-max-skew)", []string{"PUSH_MAX_SKEW=10"}, ""},
		{"QR_RATE (-qr-rate)", []string{"QR_RATE=-1"}, ""},
		{"TRUSTED_PROXIES (-trusted-proxies)", []string{"TRUSTED_PROXIES=10.0.0.1"}, ""},
		{"LOG_LEVEL (-log-level)", []string{"LOG_LEVEL=loud"}, ""},
		{"LOG_FORMAT (-log-format)", []string{"LOG_FORMAT=xml"}, ""},
		{"ADDR (-addr)", []string{"ADDR=8080", "ADDR=256.0.0.1:x", "ADDR=unix:/run/wxscan.sock"}, ""},
		{"TLS_CERT (-tls-cert), TLS_KEY (-tls-key)", []string{"TLS_CERT=x"}, "must both be set, or neither"},
		{"WECHAT_APPSECRET", []string{"-demo"}, "must not be set with -demo, where anyone can log in as anyone"},
	} {
		for _, wrong := range test.wrong {
			args, getenv, want := strings.Fields(wrong), with(), test.got
			if name, value, ok := strings.Cut(wrong, "="); ok {
				args, getenv, want = nil, with(name+"="+value), cmp.Or(test.got, fmt.Sprintf("got %q", value))
			}
			err := run(ended, args, getenv, io.Discard, io.Discard)
			if err == nil {
				t.Errorf("%s is taken", wrong)
				continue
			}
			line, more, _ := strings.Cut(err.Error(), "\n")
			if !strings.HasPrefix(line, test.name+": must ") || !strings.HasSuffix(line, want) ||
				strings.Contains(err.Error(), "hush") {
				t.Errorf("%s: %v, want %s: must … %s", wrong, err, test.name, want)
			}
			if strings.Contains(more, "wxscan -demo") {
				t.Errorf("%s: nothing is missing, and yet: %s", wrong, more)
			}
		}
	}
}

func TestDemoTakesNoCertificate(t *testing.T) {
	_, err := parseConfig([]string{"-demo", "-tls-cert", "x", "-tls-key", "y"}, none)
	if err == nil || err.Error() != "TLS_CERT (-tls-cert): must not be set with -demo, which speaks plain http" {
		t.Error(err)
	}
}

func TestAllThatIsMissingOrWrongIsSaidAtOnceInBothLanguages(t *testing.T) {
	for language, want := range map[string][]string{
		"C": {
			"WECHAT_APPID: must be the appID on the account's page: wx, then letters and digits, but is not set",
			"WECHAT_APPSECRET: must be the appsecret on the account's page: letters and digits, but is not set",
			"PUBLIC_URL (-url): must be http(s)://host[:port], no path, where phones reach us, but is not set",
			`CONFIRM (-confirm): must be true or false: whether the phone must confirm a scan, got "maybe"`,
			"without an account, try wxscan -demo"},
		"zh_CN.UTF-8": {
			"WECHAT_APPID：应为公众号页面上的 appID：wx 加字母和数字，但未设置",
			"WECHAT_APPSECRET：应为公众号页面上的 appsecret：字母和数字，但未设置",
			"PUBLIC_URL (-url)：应为手机和微信访问本服务的地址 http(s)://域名[:端口]，不带路径，但未设置",
			`CONFIRM (-confirm)：应为“true”或“false”：扫码后是否须在手机上确认，实际为 "maybe"`,
			"没有公众号？可先试用 wxscan -demo"},
	} {
		getenv := only("WECHAT_TOKEN=token123", "CONFIRM=maybe", "LANG="+language)
		err := run(t.Context(), nil, getenv, io.Discard, io.Discard)
		if err == nil || err.Error() != strings.Join(want, "\n") {
			t.Errorf("%v\nwant\n%s", err, strings.Join(want, "\n"))
		}
	}
}

func TestUnknownWordsAreAnsweredWithTheKnownOnes(t *testing.T) {
	const commands = ": there are check, sign, version and help"
	const flags = "-account -addr -allowed-origins -confirm -demo -env -"
	for args, want := range map[string]string{
		"chek": `unknown command "chek"` + commands, "": `unknown command ""` + commands,
		"-ulr x":          "unknown flag -ulr: there are " + flags,
		"-appsecret=hush": "unknown flag -appsecret: there are " + flags,
		"-json":           "unknown flag -json: there are " + flags,
		"check -jason":    "unknown flag -jason: there are -account",
		"-demo check":     `unknown argument "check": a command goes first, and a flag begins with -`,
		"-demo -url":      "flag -url: its value is missing or malformed", "---x": "unknown flag -x",
	} {
		err := run(t.Context(), strings.Split(args, " "), none, io.Discard, io.Discard)
		if got := fmt.Sprint(err); !strings.HasPrefix(got, want) || strings.Contains(got, "hush") {
			t.Errorf("%q: %v, want %s", args, err, want)
		}
		err = run(t.Context(), strings.Split(args, " "), only("LC_ALL=zh_CN.UTF-8"), io.Discard, io.Discard)
		if !strings.ContainsFunc(fmt.Sprint(err), isHan) {
			t.Errorf("in Chinese: %q: %v", args, err)
		}
	}
}

func TestSettings(t *testing.T) {
	parse := func(args []string, getenv func(string) string) config {
		t.Helper()
		c, err := parseConfig(args, getenv)
		must(t, err)
		return c
	}
	c := parse(nil, with())
	if c.addr.String() != ":8080" || c.ttl != 5*time.Minute || c.maxTickets != 100000 || c.scope != "snsapi_base" ||
		c.aesKey != nil || c.demo || c.confirm || c.apiBase != "https://api.weixin.qq.com" ||
		c.openBase != "https://open.weixin.qq.com" || c.mpBase != "https://mp.weixin.qq.com" {
		t.Errorf("by default: %+v", c)
	}
	c = parse([]string{"-ttl", "720h"}, with("TICKET_TTL=2m", "MAX_TICKETS=7", "PUBLIC_URL=http://[::1]:8080/",
		"WECHAT_AES_KEY="+docKey, "WECHAT_API_BASE=http://127.0.0.1:9/api/", "ADDR=127.0.0.1:9"))
	if c.ttl != 720*time.Hour || c.maxTickets != 7 || c.publicURL != "http://[::1]:8080" || c.aesKey == nil ||
		c.apiBase != "http://127.0.0.1:9/api" || c.addr.String() != "127.0.0.1:9" {
		t.Errorf("%+v", c)
	}
	if c := parse([]string{"-demo"}, none); c.addr.String() != "127.0.0.1:8080" {
		t.Errorf("-demo listens on %q", c.addr)
	}
	for value, want := range map[string]bool{"yes": true, "ON": true, "1": true, "off": false, "False": false} {
		if c := parse(nil, with("CONFIRM="+value)); c.confirm != want {
			t.Errorf("CONFIRM=%s: %v", value, c.confirm)
		}
	}
	for flag, want := range map[string]bool{"-confirm": true, "-confirm=no": false} {
		if c := parse([]string{flag}, with("CONFIRM=maybe")); c.confirm != want {
			t.Errorf("%s: %v", flag, c.confirm)
		}
	}
}

// written writes a file for -env.
func written(t *testing.T, text string) (file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "wxscan.env")
	must(t, os.WriteFile(file, []byte(text), 0o600))
	return file
}

func TestEnvFileGivesWhatIsNotSetOtherwise(t *testing.T) {
	file := written(t, "# a comment\r\n\n ; another\nTICKET_TTL=\"1m\"\r\nMAX_TICKETS= '7' \nQR_RATE=\nADDR=:9\n"+
		"WECHAT_VERIFY_FILE=MP_verify_x.txt\nLOG_LEVEL=debug\nLOG_LEVEL=warn\nHOME=/nowhere")
	getenv := with("WECHAT_VERIFY_FILE=MP_verify_y.txt")
	c, err := parseConfig([]string{"-addr", ":7", "-env", file}, getenv)
	must(t, err)
	if c.ttl != time.Minute || c.maxTickets != 7 || c.qrRate != 60 || c.addr.String() != ":7" ||
		c.verifyFile != "MP_verify_y.txt" || c.logLevel != slog.LevelWarn {
		t.Errorf("%+v", c)
	}
}

func TestEnvFileIsTakenByEachCommand(t *testing.T) {
	file := written(t, strings.Join(goodSettings, "\n"))
	var out strings.Builder
	must(t, run(t.Context(), []string{"sign", "-env", file}, none, &out, io.Discard))
	err := run(t.Context(), []string{"check", "-env", file, "-url", "http://" + freeAddress(t)},
		only("WECHAT_API_BASE=http://"+freeAddress(t)), &out, io.Discard)
	if err == nil || !strings.Contains(out.String(), "✓ the settings are complete and well-formed") {
		t.Errorf("%v: %s", err, out.String())
	}
	start(t, none, "-env", file, "-addr", "127.0.0.1:0")
}

func TestEnvFileWithWhatSystemdWouldPassOverIsRefused(t *testing.T) {
	for _, line := range []string{"export WECHAT_TOKEN=hush", "hush", "=hush", "WECHAT_TOKEN =hush", "2=hush",
		`WECHAT_TOKEN="hush`, `WECHAT_TOKEN=hush\`, `WECHAT_TOKEN="hu\"sh"`, `WECHAT_TOKEN='hush' # why`} {
		_, err := parseConfig([]string{"-env", written(t, "\n"+line+"\nADDR=:1\n")}, with())
		if err == nil || !strings.Contains(err.Error(), "line 2: must be NAME=value") ||
			strings.Contains(err.Error(), "hush") {
			t.Errorf("%s: %v", line, err)
		}
	}
	if _, err := parseConfig([]string{"-env", "/nowhere"}, with()); err == nil ||
		err.Error() != `-env: cannot read "/nowhere": is the file there, and may this user read it?` {
		t.Error(err)
	}
}

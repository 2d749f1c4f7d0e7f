package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// A browser is headless Chromium, driven through chromedriver as
// https://www.w3.org/TR/webdriver2/ says. Its methods end the test when they
// cannot do what they are asked. What the tests ask of a page is a JavaScript
// expression, whose value is compared as a string.
type browser struct {
	t       *testing.T
	base    string // URL of the server whose pages it opens
	session string // URL of the WebDriver session
}

// patience is how long the browser may take to show what it should. It is more
// than a code lives in these tests.
const patience = 15 * time.Second

var chromedriverLine = regexp.MustCompile(`started successfully on port ([0-9]+)`)

// browse runs wxscan -demo with further arguments, and a browser that speaks
// English. Tests that browse run in parallel, each with a server and a browser
// of its own.
func browse(t *testing.T, args ...string) *browser {
	t.Helper()
	chromedriver, chromium := program(t, "chromedriver", "chromium-driver"), program(t, "chromium", "chromium")
	t.Parallel()
	base, _, _ := start(t, none, append([]string{"-demo", "-addr", "127.0.0.1:0"}, args...)...)
	profile, logged := t.TempDir(), new(syncBuffer)
	cmd := exec.Command(chromedriver, "--port=0")
	cmd.Stdout, cmd.WaitDelay = logged, patience
	must(t, cmd.Start())
	b := &browser{t: t, base: base}
	var session struct {
		SessionID    string
		Capabilities struct {
			ProcessID int `json:"goog:processID"`
		}
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience) // the test's own has ended
		defer cancel()
		if err := b.call(ctx, "DELETE", b.session, nil, nil); err != nil && session.Capabilities.ProcessID > 0 {
			if process, err := os.FindProcess(session.Capabilities.ProcessID); err == nil {
				process.Kill()
			}
		}
		cmd.Process.Kill()
		cmd.Wait() // until the last process of Chromium, which writes to the same pipe, lets go of the profile too
	})
	var port []string
	b.until("chromedriver to start", func() bool { port = chromedriverLine.FindStringSubmatch(logged.String()); return port != nil })
	b.session = "http://127.0.0.1:" + port[1] + "/session"
	b.post("", object{"capabilities": object{"alwaysMatch": object{
		"acceptInsecureCerts": true, // those of httptest
		"goog:loggingPrefs":   object{"browser": "ALL"},
		"goog:chromeOptions": object{"binary": chromium, "args": []string{"--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
			"--disable-background-networking", "--disable-component-update", "--disable-sync", "--user-data-dir=" + profile,
			"--host-resolver-rules=MAP wx.test 127.0.0.1, MAP *.wx.test 127.0.0.1"}},
	}}}, &session)
	b.session += "/" + session.SessionID
	b.speak("en-US")
	return b
}

// call makes a request of chromedriver and decodes the value of the answer into
// v, unless that is nil.
func (b *browser) call(ctx context.Context, method, url string, body object, v any) error {
	var sent io.Reader
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return err
		}
		sent = bytes.NewReader(encoded)
	}
	req, err := http.NewRequestWithContext(ctx, method, url, sent)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var answer struct{ Value json.RawMessage }
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("chromedriver: %.500s", answer.Value)
	}
	if v == nil {
		return nil
	}
	return json.Unmarshal(answer.Value, v)
}

// get and post make requests below the session's URL.
func (b *browser) get(path string, v any) {
	b.t.Helper()
	must(b.t, b.call(b.t.Context(), "GET", b.session+path, nil, v))
}

func (b *browser) post(path string, body object, v any) {
	b.t.Helper()
	must(b.t, b.call(b.t.Context(), "POST", b.session+path, body, v))
}

// devtools sends the current tab a command of
// https://chromedevtools.github.io/devtools-protocol/.
func (b *browser) devtools(command string, params object) {
	b.t.Helper()
	b.post("/goog/cdp/execute", object{"cmd": command, "params": params}, nil)
}

// open opens a path of the server in the current tab, and returns when the page
// has loaded.
func (b *browser) open(path string) {
	b.t.Helper()
	b.post("/url", object{"url": b.base + path}, nil)
}

// script returns the value of an expression, awaited.
func (b *browser) script(expression string) string {
	b.t.Helper()
	value, err := b.try(expression)
	must(b.t, err)
	return value
}

// try is script for a tab that may be between two pages.
func (b *browser) try(expression string) (value string, err error) {
	body := object{"script": "return (async () => String(await (" + expression + ")))()", "args": []string{}}
	err = b.call(b.t.Context(), "POST", b.session+"/execute/sync", body, &value)
	return value, err
}

// wait waits until the value of an expression is what is wanted.
func (b *browser) wait(expression, want string) {
	b.t.Helper()
	var got string
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if got, err = b.try(expression); err == nil && got == want {
			return
		}
	}
	b.t.Fatalf("%s: got %q (error %v), want %q", expression, got, err, want)
}

// until waits for what no expression can tell.
func (b *browser) until(what string, is func() bool) {
	b.t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			b.t.Fatalf("waited in vain for %s", what)
		}
	}
}

func (b *browser) click(selector string) {
	b.t.Helper()
	var element map[string]string // one entry; its key is a constant of WebDriver's
	b.post("/element", object{"using": "css selector", "value": selector}, &element)
	for _, id := range element {
		b.post("/element/"+id+"/click", object{}, nil)
	}
}

// forget logs the browser out.
func (b *browser) forget() {
	b.t.Helper()
	b.devtools("Network.clearBrowserCookies", object{})
}

// tap touches a point of the page, and lets go.
func (b *browser) tap(x, y float64) {
	b.t.Helper()
	b.devtools("Input.dispatchTouchEvent", object{"type": "touchStart", "touchPoints": []object{{"x": x, "y": y}}})
	b.devtools("Input.dispatchTouchEvent", object{"type": "touchEnd", "touchPoints": []object{}})
}

// These stand for keys: https://www.w3.org/TR/webdriver2/#keyboard-actions
const tabKey, enterKey = "\ue004", "\ue007"

func (b *browser) press(keys ...string) {
	b.t.Helper()
	var strokes []object
	for _, key := range keys {
		strokes = append(strokes, object{"type": "keyDown", "value": key}, object{"type": "keyUp", "value": key})
	}
	b.post("/actions", object{"actions": []object{{"type": "key", "id": "keyboard", "actions": strokes}}}, nil)
}

// tabStops returns the texts of what the Tab key reaches, in order.
func (b *browser) tabStops() string {
	b.t.Helper()
	b.script("document.activeElement.blur()")
	var stops []string
	for len(stops) < 20 {
		b.press(tabKey)
		stop := b.script("document.activeElement === document.body ? '' : document.activeElement.innerText")
		if stop == "" || slices.Contains(stops, stop) {
			break
		}
		stops = append(stops, stop)
	}
	return strings.Join(stops, ", ")
}

// tab returns the handle of the current tab, and turn makes another the current one.
func (b *browser) tab() (handle string) {
	b.t.Helper()
	b.get("/window", &handle)
	return handle
}

func (b *browser) turn(handle string) {
	b.t.Helper()
	b.post("/window", object{"handle": handle}, nil)
}

// follow clicks a link that opens a new tab, and turns to that.
func (b *browser) follow(selector string) {
	b.t.Helper()
	var before, after []string
	b.get("/window/handles", &before)
	b.click(selector)
	b.until("a new tab", func() bool { b.get("/window/handles", &after); return len(after) > len(before) })
	b.turn(after[slices.IndexFunc(after, func(handle string) bool { return !slices.Contains(before, handle) })])
}

// speak sets the language of the current tab, and what the browser's name ends in.
func (b *browser) speak(language string, agent ...string) {
	b.t.Helper()
	name := "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36"
	b.devtools("Emulation.setUserAgentOverride", object{"acceptLanguage": language, "userAgent": strings.Join(append([]string{name}, agent...), " ")})
}

// prefer sets the colour scheme, light or dark.
func (b *browser) prefer(scheme string) {
	b.t.Helper()
	b.devtools("Emulation.setEmulatedMedia", object{"features": []object{{"name": "prefers-color-scheme", "value": scheme}}})
}

// hide puts the current window where nobody sees its pages, and unhide back.
func (b *browser) hide() {
	b.t.Helper()
	b.post("/window/minimize", object{}, nil)
	b.wait("document.hidden", "true")
}

func (b *browser) unhide() {
	b.t.Helper()
	b.post("/window/rect", object{"width": 900, "height": 760}, nil)
}

func (b *browser) resize(width, height int) {
	b.t.Helper()
	b.devtools("Emulation.setDeviceMetricsOverride", object{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false})
}

// offline cuts the network off, or restores it. A request under way lives on.
func (b *browser) offline(off bool) {
	b.t.Helper()
	b.devtools("Network.enable", object{})
	b.devtools("Network.emulateNetworkConditions", object{"offline": off, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1})
}

// quiet complains of the errors and warnings on the consoles of all tabs since
// the last call. What the Content-Security-Policy forbids is among them.
func (b *browser) quiet(at string) {
	b.t.Helper()
	var entries []struct{ Level, Message string }
	b.post("/se/log", object{"type": "browser"}, &entries)
	for _, entry := range entries {
		if entry.Level == "SEVERE" || entry.Level == "WARNING" {
			b.t.Errorf("%s: the console says %s", at, entry.Message)
		}
	}
}

// screenshot saves a picture of the page in the folder WXSCAN_SCREENSHOTS, if
// that is set.
func (b *browser) screenshot(name string) {
	b.t.Helper()
	folder := os.Getenv("WXSCAN_SCREENSHOTS")
	if folder == "" {
		return
	}
	var encoded string
	b.get("/screenshot", &encoded)
	picture, err := base64.StdEncoding.DecodeString(encoded)
	must(b.t, err)
	must(b.t, os.MkdirAll(folder, 0o755))
	must(b.t, os.WriteFile(filepath.Join(folder, name+".png"), picture, 0o644))
}

// textOf is an expression: the text that one sees of an element, "" if there is none.
func textOf(selector string) string {
	return fmt.Sprintf("(document.querySelector(%q)?.innerText ?? '')", selector)
}

// Expressions for what is on the login page.
const (
	pageCode   = "(document.querySelector('.wxscan-code:not(.old) img')?.naturalWidth > 0)" // whether there is one to scan
	pageTicket = "new URL(document.querySelector('.wxscan-code img').src).searchParams.get('ticket')"
	pageAsked  = "performance.getEntriesByType('resource').filter((r) => r.name.endsWith('/wechat/getloginqr')).length"
	pagePolls  = "performance.getEntriesByType('resource').filter((r) => r.name.includes('/wechat/checklogin')).length"
	pageStatus = "document.querySelector('[role=status] .wxscan-status').innerText"
	pageHint   = "document.querySelector('[role=status] .wxscan-hint').innerText"
	pageHeld   = "getComputedStyle(document.querySelector('.wxscan-choice button')).pointerEvents" // none while the phone may press nothing
	pageOpenID = "document.querySelector('.wxscan-openid').innerText"
)

// What the status says.
const (
	prompt   = "Scan with WeChat"
	hintScan = "The first time, follow the account"
	hintAuth = "Then look at your phone"
	saysLost = "The connection is lost. Trying again…"
)

// way opens the login page, and waits for the code of a flow.
func (b *browser) way(flow string) {
	b.t.Helper()
	b.open("/")
	b.wait(pageHint, hintScan)
	if flow == "auth" {
		b.click(".wxscan-link")
		b.wait(pageHint, hintAuth)
	}
	b.wait(pageCode, "true")
}

// scan scans the code on the page, from outside.
func (b *browser) scan(openID string) {
	b.t.Helper()
	scanned(b.t, b.base, b.script(pageTicket), openID)
}

func TestBrowserShowsWhoHasScanned(t *testing.T) {
	b := browse(t)
	for _, test := range []struct{ flow, button, phoneEndsAt, phoneSays string }{
		{"scan", "scan", "/demo/q/", "您已登录"},
		{"scan", "subscribe", "/demo/q/", "您已登录"},
		{"auth", "allow", "/static/html/loginsucceed.html", "You are logged in"},
	} {
		b.forget()
		b.way(test.flow)
		b.script("addEventListener('wxscan:login', (e) => { localStorage.shown = Date.now(); localStorage.told = e.detail.openid })")
		page := b.tab()

		b.follow(".wxscan-demo")
		b.speak("en-US")
		b.wait("document.forms.length", "1")
		b.script("addEventListener('submit', () => { localStorage.pressed = Date.now() })")
		b.click("[value=" + test.button + "]")
		b.wait("location.pathname.startsWith('"+test.phoneEndsAt+"') && document.body.innerText.includes('"+test.phoneSays+"')", "true")

		b.turn(page)
		b.wait(pageOpenID, "alice")
		b.wait(pageStatus, "You are logged in")
		if took, err := strconv.Atoi(b.script("localStorage.shown - localStorage.pressed")); err != nil || took >= 1000 {
			t.Errorf("%s: the page learns of the scan %d ms after it (error %v)", test.button, took, err)
		}
		if got, want := b.script("localStorage.told"), "alice"; got != want {
			t.Errorf("%s: the event says %q, want %q", test.button, got, want)
		}
		b.quiet(test.button)
	}
}

func TestBrowserRenewsTheCodeWhileSomebodyLooks(t *testing.T) {
	b := browse(t, "-ttl", "2s")
	b.open("/")
	b.wait(pageCode, "true")
	first := b.script(pageTicket)
	b.wait(pageCode+" && "+pageTicket+" !== '"+first+"'", "true")

	b.hide()
	// Nothing may happen in the time that this code and another would have lived.
	asked, now := b.script(pageAsked), b.script("performance.now()")
	b.wait("performance.now() > "+now+" + 4000", "true")
	if got := b.script(pageAsked); got != asked {
		t.Errorf("a hidden page has asked for %s codes, want %s", got, asked)
	}

	b.unhide()
	b.wait(pageCode+" && "+pageAsked+" > "+asked, "true")
}

// TestBrowserPollsOnlyWhileItIsSeen has more login pages open than a browser
// opens connections to a host over HTTP/1.1, of which one is to be seen.
func TestBrowserPollsOnlyWhileItIsSeen(t *testing.T) {
	b := browse(t)
	b.open("/")
	b.wait(pageCode, "true")
	first := b.tab()
	for i := range 7 {
		b.hide()
		var made struct{ Handle string }
		b.post("/window/new", object{"type": "window"}, &made) // one that is not hidden with the others
		b.turn(made.Handle)
		b.speak("en-US")
		begun := time.Now()
		b.open("/")
		b.wait(pageCode, "true")
		if took := time.Since(begun); took > 5*time.Second {
			t.Errorf("with %d pages hidden, one more takes %v", i+1, took)
		}
	}
	b.turn(first)
	b.scan("alice")
	polls := b.script(pagePolls)
	b.script("new Promise((resolve) => setTimeout(resolve, 1500))")
	if got := b.script(pagePolls); got != polls || b.script(textOf(".wxscan-openid")) != "" {
		t.Errorf("a hidden page polls: %s times, then %s", polls, got)
	}
	begun := time.Now()
	b.unhide()
	b.wait(pageOpenID, "alice")
	if took := time.Since(begun); took > 2*time.Second {
		t.Errorf("seen again, the page takes %v to learn of the scan", took)
	}
	b.quiet("eight pages")
}

func TestBrowserLeavesNoListenersBehind(t *testing.T) {
	b := browse(t)
	b.devtools("Page.addScriptToEvaluateOnNewDocument", object{"source": `
		window.listeners = { abort: 0, online: 0, visibilitychange: 0 };
		for (const [name, one] of [["addEventListener", 1], ["removeEventListener", -1]]) {
			const real = EventTarget.prototype[name];
			EventTarget.prototype[name] = function (event, ...rest) {
				if (event in window.listeners) window.listeners[event] += one;
				return real.call(this, event, ...rest);
			};
		}`})
	const listeners = "window.listeners.abort + ' ' + window.listeners.online + ' ' + window.listeners.visibilitychange"
	b.open("/")
	b.wait(pageStatus, prompt)
	b.wait("window.listeners.abort", "2") // of the poll that is parked
	parked := b.script(listeners)
	b.devtools("Network.enable", object{})
	b.devtools("Network.setBlockedURLs", object{"urls": []string{"*/wechat/checklogin*"}})
	b.script("stop()") // the poll under way
	b.wait(pagePolls+" > 2", "true")
	b.devtools("Network.setBlockedURLs", object{"urls": []string{}})
	b.wait(pageStatus, prompt)
	b.wait(listeners, parked)
}

func TestBrowserGoesOnWithTheNextWayWhereOneFails(t *testing.T) {
	b := browse(t)
	b.devtools("Page.addScriptToEvaluateOnNewDocument", object{"source": `
		const real = fetch;
		window.fetch = (url, ...rest) => url.endsWith("/wechat/getloginqr")
			? Promise.resolve(new Response('{"error":"wechat_refused"}', { status: 502 })) : real(url, ...rest);`})
	b.open("/")
	b.wait(pageHint, "The other way is down just now")
	b.wait(pageCode, "true")
	b.scan("alice")
	b.wait(pageOpenID, "alice")
}

func TestBrowserKnowsWhoIsLoggedIn(t *testing.T) {
	b := browse(t)
	openID := strings.Repeat("oW", 14)
	b.open("/")
	b.wait(pageCode, "true")
	b.scan(openID)
	b.wait(pageOpenID, "oWoWoW…oWoW")
	b.open("/?return_to=/healthz")
	b.wait(pageStatus, "You are logged in")
	b.devtools("Browser.grantPermissions", object{"permissions": []string{"clipboardReadWrite", "clipboardSanitizedWrite"}})
	b.click(".wxscan-openid")
	b.wait(pageStatus, "Copied")
	if got := b.script("navigator.clipboard.readText()"); got != openID {
		t.Errorf("copied: %q, want %q", got, openID)
	}
	b.click(".wxscan-main")
	b.wait("location.pathname", "/healthz")
	b.open("/")
	b.click(".wxscan-more .wxscan-button")
	b.wait(pageCode, "true")
	b.open("/") // and it stays so
	b.wait(pageCode, "true")
}

func TestBrowserOnAPhoneSavesOrCopiesWhatItCannotScan(t *testing.T) {
	b := browse(t)
	b.speak("en", "Mobile")
	b.resize(375, 667)
	b.open("/")
	b.wait(pageStatus, "Save the picture, and scan it in WeChat")
	b.devtools("Browser.grantPermissions", object{"permissions": []string{"clipboardReadWrite", "clipboardSanitizedWrite"}})
	b.click(".wxscan-main")
	b.wait(pageStatus, "Copied")
	link := b.script("navigator.clipboard.readText()")
	if !strings.HasPrefix(link, b.base+"/demo/connect/oauth2/authorize?") {
		t.Errorf("the link is %q", link)
	}
	if got := b.script("document.querySelector('.wxscan-button[download]').href === document.querySelector('.wxscan-code img').src"); got != "true" {
		t.Error("what is saved is not the picture shown")
	}
	b.wait(pageHint, "Or open the link in a WeChat chat")
	b.screenshot("on-a-phone")
	b.click(".wxscan-link") // the other way has no link that WeChat opens
	b.wait(textOf(".wxscan-main"), "")
	b.wait(textOf(".wxscan-button[download]"), "Save picture")
}

// TestBrowserShowsTheDemosPhoneBesideTheLogin presses "scan" at the right and
// sees the left change.
func TestBrowserShowsTheDemosPhoneBesideTheLogin(t *testing.T) {
	b := browse(t, "-confirm", "-site-name", "Acme Notes")
	b.resize(960, 760)
	b.open("/")
	b.wait(pageCode, "true")
	const phone = "frames[0].document.querySelector"
	b.wait(phone+"('[value=scan]')?.checkVisibility() ?? false", "true")
	b.screenshot("screenshot") // of the READMEs
	b.script(phone + "('[value=scan]').click()")
	b.wait(textOf(".wxscan-number")+".length", "2")
	b.wait(phone+"('.bubble a')?.innerText ?? ''", "查看并确认")
	if got := b.script(phone + "('.bubble').scrollWidth <= " + phone + "('.chat').clientWidth"); got != "true" {
		t.Error("the bubble runs out of the phone")
	}
	b.script(phone + "('.bubble a').click()")
	b.wait(phone+"('.wxscan-choice') !== null", "true")
	b.wait("frames[0].getComputedStyle("+phone+"('.wxscan-choice button')).pointerEvents", "auto")
	b.screenshot("demo-confirm")
	b.script(phone + "(`[value='${" + textOf(".wxscan-number") + "}']`).click()")
	b.wait(pageOpenID, "alice")
	b.wait("frames[0].location.pathname", "/static/html/loginsucceed.html")
	b.quiet("the demo")
}

func TestBrowserRecoversALostConnection(t *testing.T) {
	b := browse(t)
	b.open("/")
	b.wait(pageStatus, prompt)
	b.offline(true)
	b.script("stop()") // the poll under way
	b.wait(pageStatus, saysLost)
	b.offline(false)
	b.wait(pageStatus, prompt)
	b.scan("bob")
	b.wait(pageOpenID, "bob")
}

func TestBrowserRecoversAConnectionLostForLongerThanACodeLives(t *testing.T) {
	b := browse(t, "-ttl", "2s")
	b.open("/")
	b.wait(pageCode, "true")
	b.offline(true)
	b.wait(pageStatus, saysLost)
	b.wait("document.querySelector('.wxscan-bad') !== null", "true")
	b.offline(false)
	b.wait(pageCode, "true")
}

func TestBrowserTellsAnErrorInPlainWords(t *testing.T) {
	b := browse(t, "-max-tickets", "1", "-ttl", "4s")
	b.resize(900, 760)
	b.open("/static/html/loginsucceed.html") // a browser's first page takes longest
	taken := begun(t, b.base, "getauthqr")
	b.open("/")
	b.wait(pageStatus, "Too many people just now. Try again in a moment.")
	b.screenshot("error")
	if got, want := b.tabStops(), "Try again, Another way, 简体, 繁體, English"; got != want {
		t.Errorf("Tab reaches %q, want %q", got, want)
	}
	if answer := polled(t, b.base, taken.Ticket, "25"); answer.Status != statusExpired {
		t.Fatalf("the ticket is %q, want %q", answer.Status, statusExpired)
	}
	b.until("a code", func() bool { // which there is once the ticket has been swept away
		b.script("document.querySelector('.wxscan-main')?.click()")
		return b.script(pageCode) == "true"
	})
	if got := b.script(textOf(".wxscan-main")); got != "" {
		t.Errorf("the button %q stays", got)
	}
}

func TestBrowserSpeaksTheUsersLanguage(t *testing.T) {
	b := browse(t, "-site-name", "Acme")
	for _, test := range []struct{ language, lang, heading, prompt, succeeded string }{
		{"zh-CN", "zh-CN", "登录 Acme", "请用微信扫一扫", "登录成功"},
		{"zh-TW", "zh-TW", "登入 Acme", "請用微信掃一掃", "登入成功"},
		{"zh-Hant-HK", "zh-TW", "登入 Acme", "請用微信掃一掃", "登入成功"},
		{"en", "en", "Log in to Acme", prompt, "You are logged in"},
		{"fr", "en", "Log in to Acme", prompt, "You are logged in"},
	} {
		b.speak(test.language)
		b.open("/")
		b.wait(pageStatus, test.prompt)
		if lang, heading := b.script("document.documentElement.lang"), b.script(textOf("h1")); lang != test.lang || heading != test.heading {
			t.Errorf("%s: got %q, %q, want %q, %q", test.language, lang, heading, test.lang, test.heading)
		}
		if got := b.script("document.title"); got != test.heading {
			t.Errorf("%s: the title is %q, want %q", test.language, got, test.heading)
		}
		b.open("/static/html/loginsucceed.html")
		if lang, heading := b.script("document.documentElement.lang"), b.script(textOf("h1")); lang != test.lang || heading != test.succeeded {
			t.Errorf("%s: got %q, %q, want %q, %q", test.language, lang, heading, test.lang, test.succeeded)
		}
	}
	b.click(".wxscan-languages [lang=zh-TW]")
	b.wait(textOf("h1"), "登入成功")
	b.open("/") // which remembers
	b.wait(textOf("h1"), "登入 Acme")
}

// TestBrowserFitsEveryPage looks at every page in every language, light and
// dark, wide and narrow. The login card has one size, whatever it shows.
func TestBrowserFitsEveryPage(t *testing.T) {
	b := browse(t, "-scope", "snsapi_userinfo", "-max-tickets", "40")
	phone := func(flow string) {
		b.way(flow)
		b.open(strings.TrimPrefix(b.script("document.querySelector('.wxscan-demo').href"), b.base))
	}
	refused := func() {
		b.devtools("Network.setBlockedURLs", object{"urls": []string{"*/wechat/get*"}})
		b.open("/")
		b.wait(textOf(".wxscan-main")+" !== ''", "true")
		b.devtools("Network.setBlockedURLs", object{"urls": []string{}})
	}
	const (
		ground   = "(getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).every((c) => c < 64) ? 'dark' : 'light')"
		overflow = "(document.documentElement.scrollWidth - document.documentElement.clientWidth)"
	)
	b.devtools("Network.enable", object{})
	for language, lang := range map[string]string{"en": "en", "zh-CN": "zh-CN", "zh-TW": "zh-TW"} {
		heights := make(map[int]string) // of the card, by the page's width
		for _, page := range []struct {
			name   string
			isCard bool
			open   func()
			whole  string // expression: whether all of it is there
		}{
			{"login", true, func() { b.open("/") }, pageCode},
			{"auth", true, func() { b.click(".wxscan-link"); b.wait(pageHint+".length > 0", "true") }, pageCode},
			{"error", true, refused, "document.querySelector('.wxscan-bad') !== null"},
			{"result", true, func() { b.open("/"); b.wait(pageCode, "true"); b.scan(strings.Repeat("oW", 32)) }, "document.querySelector('.wxscan-openid') !== null"},
			{"session", true, func() { b.open("/?return_to=/healthz") }, "document.querySelector('.wxscan-main') !== null"},
			{"profile", true, func() {
				b.forget()
				b.open("/")
				b.wait(pageCode, "true")
				b.click(".wxscan-link")
				b.wait(pageCode+" && performance.getEntriesByType('resource').some((r) => r.name.endsWith('/wechat/getauthqr'))", "true")
				b.scan("alice")
			}, "document.querySelector('.wxscan-avatar')?.naturalWidth > 0"},
			{"loginsucceed", false, func() { b.open("/static/html/loginsucceed.html") }, "true"},
			{"loginfailed", false, func() { b.open("/static/html/loginfailed.html?reason=snapshot") }, "true"},
		} {
			b.speak(language)
			page.open()
			b.wait(page.whole, "true")
			b.wait("document.documentElement.lang", lang)
			for _, scheme := range []string{"light", "dark"} {
				b.prefer(scheme)
				b.wait(ground, scheme)
				for width, height := range map[int]int{1280: 760, 900: 760, 375: 667, 320: 568} {
					b.resize(width, height)
					name := fmt.Sprintf("%s-%s-%s-%d", page.name, language, scheme, width)
					if got, want := b.script("innerWidth + ' + ' + "+overflow), strconv.Itoa(width)+" + 0"; got != want {
						t.Errorf("%s: the page is %s pixels wide, want %s", name, got, want)
					}
					card := b.script("document.querySelector('main').offsetHeight")
					if page.isCard && heights[width] == "" {
						heights[width] = card
					}
					if page.isCard && heights[width] != card {
						t.Errorf("%s: the card is %s pixels high, and %s with a code", name, card, heights[width])
					}
					b.screenshot(name)
				}
				if page.name == "login" {
					if got, want := b.script("getComputedStyle(document.querySelector('.wxscan-code')).backgroundColor"), "rgb(255, 255, 255)"; got != want {
						t.Errorf("%s: the code is on %s, want %s", scheme, got, want)
					}
				}
			}
			b.prefer("light")
			b.resize(900, 760)
		}
		b.forget()
	}
	b.speak("en")
	for _, flow := range []string{"scan", "auth"} { // the demo's phone
		phone(flow)
		b.wait("document.querySelector('[name=openid]').checkVisibility()", "true")
		for width, height := range map[int]int{900: 760, 375: 667, 320: 568} {
			b.resize(width, height)
			if got := b.script(overflow); got != "0" {
				t.Errorf("the phone (%s) is %s pixels too wide at %d", flow, got, width)
			}
			if got, want := b.script("document.querySelector('main').offsetWidth"), strconv.Itoa(min(width, 384)); got != want {
				t.Errorf("the phone (%s) is %s pixels wide at %d, want %s", flow, got, width, want)
			}
			b.screenshot(fmt.Sprintf("phone-%s-%d", flow, width))
		}
	}
}

func TestBrowserNeedsNeitherMouseNorEyes(t *testing.T) {
	b := browse(t)
	b.resize(800, 760)
	b.open("/")
	b.wait(pageStatus, prompt)
	for _, test := range []struct{ what, expression, want string }{
		{"the time left", "document.querySelector('.wxscan-time').role", "timer"},
		{"the picture", "document.querySelector('.wxscan-code img').alt", "Login QR code, to be scanned with WeChat"},
		{"the language", "document.querySelector('.wxscan-languages [aria-pressed=true]').innerText", "English"},
	} {
		if got := b.script(test.expression); got != test.want {
			t.Errorf("%s: got %q, want %q", test.what, got, test.want)
		}
	}
	if got, want := b.tabStops(), "Another way, Simulated phone, 简体, 繁體, English"; got != want {
		t.Errorf("Tab reaches %q, want %q", got, want)
	}
	b.script("document.activeElement.blur()")
	b.press(tabKey, enterKey)
	b.wait(pageHint, hintAuth)
	b.wait("document.activeElement.innerText", "Another way") // the focus is not lost with the button
}

// TestBrowserInsideWeChatNeedsNoScan goes the way of who opens the login page
// on the phone, and has no second screen to scan.
func TestBrowserInsideWeChatNeedsNoScan(t *testing.T) {
	b := browse(t)
	b.speak("en", "MicroMessenger/8.0.50")
	b.open("/")
	b.wait("location.pathname", "/demo/connect/oauth2/authorize")
	b.click("[value=decline]")
	b.wait("location.pathname + location.search", "/static/html/loginfailed.html?reason=denied")

	b.open("/") // which must not send whoever declined straight back
	b.wait(textOf(".wxscan-main"), "Try again")
	b.click(".wxscan-main")
	b.wait("location.pathname", "/demo/connect/oauth2/authorize")
	b.click("[value=allow]")
	b.wait("location.pathname", "/")
	b.wait(pageOpenID, "alice")
	if b.script("sessionStorage.getItem('wxscan')") != "null" {
		t.Error("the ticket stays in sessionStorage")
	}
}

func TestBrowserInsideWeChatTellsTheNumberOfItsOwnPage(t *testing.T) {
	b := browse(t, "-confirm")
	b.speak("en", "MicroMessenger/8.0.50")
	b.open("/")
	b.wait("location.pathname", "/demo/connect/oauth2/authorize")
	b.click("[value=allow]")
	b.wait(textOf(".wxscan-own b")+".length", "2")
	number := b.script(textOf(".wxscan-own b"))
	b.wait(pageHeld, "auto")
	b.click("[value='" + number + "']")
	b.wait("location.pathname", "/")
	b.wait(pageOpenID, "alice")
}

func TestBrowserShowsOneReasonForAFailedLogin(t *testing.T) {
	b := browse(t)
	const unavailable = "WeChat is not answering just now. Reload the page in a moment and scan again."
	for reason, want := range map[string]string{
		"denied":      "You did not agree. To log in, scan again and agree.",
		"expired":     "The QR code has expired. Scan the new one on the page.",
		"used":        "This QR code has been used. Reload the page and scan the new one.",
		"snapshot":    "This is a snapshot page. Tap “使用完整服务” (use the full service) at the lower right, and agree again.",
		"declined":    "You declined. Nobody was logged in as you.",
		"number":      "That is not the number on the page. Nobody was logged in. If it was you, scan again.",
		"unavailable": unavailable,
		"made-up":     unavailable,
		"":            unavailable,
	} {
		b.open("/static/html/loginfailed.html?reason=" + reason)
		if got := b.script("[...document.querySelectorAll('[data-reason]')].filter((p) => p.checkVisibility()).map((p) => p.innerText).join('|')"); got != want {
			t.Errorf("%q: got %q, want %q", reason, got, want)
		}
	}
}

func TestBrowserConfirmsOnThePhone(t *testing.T) {
	addr := freeAddress(t)
	// Not on loopback, where browsers trust plain http as if it were https.
	b := browse(t, "-confirm", "-addr", addr, "-url", strings.Replace("http://"+addr, "127.0.0.1", "wx.test", 1))
	for _, test := range []struct{ flow, button, answer, want string }{
		{"scan", "scan", "number", "You are logged in"}, {"auth", "allow", "number", "You are logged in"}, {"auth", "allow", "no", "Declined on the phone"},
	} {
		b.forget()
		b.way(test.flow)
		page := b.tab()
		b.follow(".wxscan-demo")
		b.speak("en-US")
		b.click("[value=" + test.button + "]")
		if test.flow == "scan" {
			b.wait("document.querySelector('.bubble a[href*=confirm]') !== null", "true")
			b.click(".bubble a[href*=confirm]")
		}
		b.wait("location.pathname", "/wechat/confirm")
		for width, height := range map[int]int{900: 760, 375: 667, 320: 568} {
			b.resize(width, height)
			if got := b.script("document.documentElement.scrollWidth - document.documentElement.clientWidth"); got != "0" {
				t.Errorf("the page is %s pixels too wide at %d", got, width)
			}
			b.screenshot(fmt.Sprintf("confirm-%s-%d", test.flow, width))
		}
		phone := b.tab()
		b.turn(page)
		b.wait(textOf(".wxscan-number")+".length", "2")
		number := b.script(textOf(".wxscan-number"))
		b.wait(pageStatus, "Scanned. Choose this number on your phone")
		b.screenshot("scanned-" + test.flow)
		b.turn(phone)
		b.wait(pageHeld, "auto")
		b.click("[value='" + strings.Replace(test.answer, "number", number, 1) + "']")
		b.wait("location.pathname.startsWith('/static/html/login')", "true")
		b.turn(page)
		b.wait(pageStatus, test.want)
		b.quiet(test.want)
	}
	b.click(".wxscan-more button")
	b.wait(pageCode, "true")
}

// TestBrowserDecidesNothingByFastTaps has a page that says "tap fast", where the
// phone's buttons will be. Its fourth tap moves to where the authorize page leads,
// which asks nothing for snsapi_base, with the ticket of whoever made that page.
func TestBrowserDecidesNothingByFastTaps(t *testing.T) {
	bait := newLocalServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		io.WriteString(w, `<!doctype html><meta name="viewport" content="width=device-width"><title>Tap fast</title><link rel="icon" href="data:,">
			<style>button { position: fixed; inset: 0; width: 100%; height: 100% }</style><script>let taps = 0</script>
			<button onclick="if (++taps === 4) location = decodeURIComponent(location.search.slice(1))">Tap fast!</button>`)
	}))
	b := browse(t, "-confirm")
	b.resize(375, 667)
	b.devtools("Emulation.setTouchEmulationEnabled", object{"enabled": true})
	for place, slow := 1, 0; place <= 4; place++ {
		b.post("/url", object{"url": allowed(t, begun(t, b.base, "getauthqr").URL, "alice")}, nil)
		b.wait("location.pathname", "/wechat/confirm")
		at := b.script(fmt.Sprintf("(({x, y, width, height}) => (x + width / 2) + ' ' + (y + height / 2))"+
			"(document.querySelector('.wxscan-choice button:nth-of-type(%d)').getBoundingClientRect())", place))
		var x, y float64
		_, err := fmt.Sscan(at, &x, &y)
		must(t, err)

		ticket := begun(t, b.base, "getauthqr")
		b.post("/url", object{"url": bait + "?" + url.QueryEscape(allowed(t, ticket.URL, "alice"))}, nil)
		tick := time.NewTicker(150 * time.Millisecond)
		var longest time.Duration // between two taps
		for i, last := 0, time.Now(); i < 25; i++ {
			<-tick.C
			b.tap(x, y)
			longest, last = max(longest, time.Since(last)), time.Now()
		}
		tick.Stop()
		if longest > holdBack/2 {
			if slow++; slow > 8 {
				t.Skipf("a tap takes %v: this machine is too busy to tap fast", longest)
			}
			place--
			continue
		}
		if got := b.script("location.pathname"); got != "/wechat/confirm" {
			t.Errorf("place %d: the taps lead to %s", place, got)
		}
		if got := polled(t, b.base, ticket.Ticket, ""); got.Status != statusScanned {
			t.Errorf("place %d: the taps make the login %q", place, got.Status)
		}
		b.wait(pageHeld, "auto")
		b.tap(x, y)
		b.wait("location.pathname.startsWith('/static/html/login')", "true")
	}
}

func TestBrowserGoesBackToWhereItCameFrom(t *testing.T) {
	b := browse(t)
	for query, want := range map[string]string{
		"/healthz?a=1&b=2":                "/healthz?a=1&b=2",
		"/报告":                             "/%E6%8A%A5%E5%91%8A",
		url.QueryEscape("/healthz?q=a b"): "/healthz?q=a%20b",
		"/x?url=https%3A%2F%2Fa.example":  "/x?url=https%3A%2F%2Fa.example",
		"/100%25":                         "/100%25",
	} {
		b.forget()
		b.open("/?return_to=" + query)
		b.wait(pageCode, "true")
		b.scan("alice")
		b.wait("location.pathname + location.search", want)
	}
	b.forget()
	b.open("/?return_to=//127.0.0.1:1/")
	b.wait(pageCode, "true")
	b.scan("alice")
	b.wait(pageOpenID, "alice")
	b.wait("location.pathname", "/")

	var paths []string // what is taken of all that has ever led astray
	for _, path := range astray {
		for _, query := range []string{path, url.QueryEscape(path), url.QueryEscape(url.QueryEscape(path))} {
			if to := returnTo("return_to=" + query); to != "" {
				paths = append(paths, to)
			}
		}
	}
	encoded, err := json.Marshal(paths)
	must(t, err)
	if got := b.script(string(encoded) + ".filter((to) => new URL(to, location).origin !== location.origin).join(' ')"); got != "" || len(paths) == 0 {
		t.Errorf("to another site: %q, of %d", got, len(paths))
	}
}

func TestBrowserShowsTheBoxInAnotherSitesPage(t *testing.T) {
	var wxscan string
	site := newLocalServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprintf(w, `<!doctype html><link rel="icon" href="data:,"><div data-wxscan="auth" data-return-to="/\127.0.0.1:1/"></div><script src="%s/static/wxscan.js" defer></script>`, wxscan)
	}))
	b := browse(t, "-allowed-origins", site)
	wxscan = b.base
	b.post("/url", object{"url": site}, nil)
	b.wait(pageCode, "true")
	b.wait("getComputedStyle(document.querySelector('.wxscan')).display", "flex")
	b.script("addEventListener('wxscan:login', (e) => { window.told = e.detail.token.split('.').length + e.detail.openid })")
	b.scan("alice")
	b.wait(pageOpenID, "alice")
	b.wait("window.told", "3alice") // and it stays, for return_to is another site
	b.quiet("the other site")
}

// TestBrowserKeepsNoSessionThatASiblingSiteBrings has a page of a sibling domain,
// which is same-site but not same-origin, load in each way the poll of a login
// that is not the browser's. It takes https: without, browsers do not say where a
// request comes from.
func TestBrowserKeepsNoSessionThatASiblingSiteBrings(t *testing.T) {
	secure := func(host string) (server *httptest.Server, origin string) {
		server = httptest.NewUnstartedServer(nil)
		t.Cleanup(server.Close)
		return server, "https://" + host + server.Listener.Addr().String()[len("127.0.0.1"):]
	}
	login, public := secure("login.wx.test")
	others, evil := secure("evil.wx.test")
	allowed := strings.Replace(evil, "evil", "front", 1)
	b := browse(t, "-url", public, "-allowed-origins", allowed)
	var polls sync.Map // by ticket: whether the answer had a session
	wxscan, err := url.Parse(b.base)
	must(t, err)
	proxy := httputil.NewSingleHostReverseProxy(wxscan)
	login.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		proxy.ServeHTTP(w, r)
		polls.Store(r.FormValue("ticket"), w.Header().Get("Set-Cookie") != "")
	})
	login.StartTLS()
	others.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		io.WriteString(w, `<!doctype html><link rel="icon" href="data:,"><iframe name="frame"></iframe>`)
	})
	others.StartTLS()
	// poll loads the poll of mallory's login in a page, by a script that calls it poll.
	poll := func(page, script string) (session bool) {
		t.Helper()
		qr := begun(t, b.base, "getauthqr")
		scanned(t, b.base, qr.Ticket, "mallory")
		b.post("/url", object{"url": page}, nil)
		b.script(fmt.Sprintf(`(() => {
			const poll = %q, add = (tag, props) => document.body.append(Object.assign(document.createElement(tag), props));
			%s
		})()`, public+"/wechat/checklogin?ticket="+qr.Ticket, script))
		b.until(script, func() bool {
			with, asked := polls.Load(qr.Ticket)
			session = asked && with.(bool)
			return asked
		})
		return session
	}
	const session = "fetch('/wechat/session').then((r) => r.json()).then((s) => s.openid ?? s.error)"
	for _, script := range []string{
		"add('img', { src: poll })",
		"add('img', { src: poll, crossOrigin: 'use-credentials' })",
		"add('script', { src: poll })",
		"add('script', { src: poll, type: 'module', crossOrigin: 'use-credentials' })",
		"add('link', { href: poll, rel: 'stylesheet' })",
		"add('link', { href: poll, rel: 'prefetch' })",
		"add('link', { href: poll, rel: 'preload', as: 'fetch', crossOrigin: 'use-credentials' })",
		"add('iframe', { src: poll })",
		"add('object', { data: poll })",
		"add('embed', { src: poll })",
		"add('video', { src: poll })",
		"document.body.style.background = `url(${poll})`",
		"const [action, t] = poll.split('?ticket='); add('form', { action, innerHTML: `<input name=ticket value=${t}>` });" +
			"document.forms[0].submit()",
		"frames[0].location = poll",
		"location = poll",
		"add('meta', { httpEquiv: 'refresh', content: `0; url=${poll}` })",
		"fetch(poll, { mode: 'no-cors', credentials: 'include' })",
		"fetch(poll, { credentials: 'include' }).catch(() => {})",
		"new EventSource(poll, { withCredentials: true })",
		"new Worker(URL.createObjectURL(new Blob([`importScripts('${poll}')`])))",
	} {
		if poll(evil, script) {
			t.Errorf("%s: the answer has a session", script)
		}
	}
	b.post("/url", object{"url": public}, nil)
	if got := b.script(session); got != "no_session" {
		t.Errorf("the sibling site has logged the browser in as %q", got)
	}
	if poll(allowed, "add('img', { src: poll })") {
		t.Error("a picture on an allowed site: the answer has a session")
	}
	if !poll(allowed, "fetch(poll, { credentials: 'include' })") {
		t.Error("a fetch of an allowed site: the answer has no session")
	}
	b.post("/url", object{"url": public}, nil)
	b.wait(session, "mallory")
	b.click(".wxscan-more .wxscan-button")
	b.wait(session, "no_session")
	b.wait(pageCode, "true")
	b.scan("alice")
	b.wait(pageOpenID, "alice")
	b.wait(session, "alice")
}

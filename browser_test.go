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
	driver  *exec.Cmd
}

// idle holds the browsers that no test has just now, launched or yet to be: they take
// long to start. There are two, as more would only wait for the processors.
var idle = func() chan *browser {
	two := make(chan *browser, 2)
	two <- new(browser)
	two <- new(browser)
	return two
}()

// patience is how long the browser may take to show what it should. It is more
// than a code lives in these tests.
const patience = 15 * time.Second

// browse runs wxscan -demo with further arguments, and returns a browser with one
// window and no cookies, which speaks English. Tests that browse run in parallel,
// each with a server of its own.
func browse(t *testing.T, args ...string) *browser {
	t.Helper()
	chromedriver := program(t, "chromedriver", "chromium-driver")
	chromium := program(t, "chromium-headless-shell", "chromium-headless-shell")
	t.Parallel()
	b := <-idle
	t.Cleanup(func() {
		if t.Failed() {
			b.end()
			b = new(browser)
		}
		idle <- b
	})
	b.t = t
	b.base, _, _ = start(t, none, append([]string{"-demo", "-addr", "127.0.0.1:0"}, args...)...)
	if b.driver == nil {
		b.launch(chromedriver, chromium)
	}
	var old []string
	b.do("GET", "/window/handles", nil, &old)
	window := b.window()
	for _, handle := range old {
		b.turn(handle)
		b.do("DELETE", "/window", nil, nil)
	}
	b.turn(window)
	b.forget()
	b.do("POST", "/se/log", object{"type": "browser"}, nil) // of the test before
	b.speak("en-US")
	return b
}

func (b *browser) launch(chromedriver, chromium string) {
	logged := new(syncBuffer)
	b.driver = exec.Command(chromedriver, "--port=0")
	b.driver.Stdout, b.driver.WaitDelay = logged, patience
	must(b.t, b.driver.Start())
	var port []string
	b.until("chromedriver to start", func() bool {
		port = regexp.MustCompile(`started successfully on port ([0-9]+)`).FindStringSubmatch(logged.String())
		return port != nil
	})
	b.session = "http://127.0.0.1:" + port[1] + "/session"
	var session struct{ SessionID string }
	b.do("POST", "", object{"capabilities": object{"alwaysMatch": object{
		"acceptInsecureCerts": true, // those of httptest
		"goog:loggingPrefs":   object{"browser": "ALL"},
		"goog:chromeOptions": object{"binary": chromium, "args": []string{"--headless", "--no-sandbox", "--disable-gpu",
			"--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
			"--disable-sync",
			"--host-resolver-rules=MAP wx.test 127.0.0.1, MAP *.wx.test 127.0.0.1"}},
	}}}, &session)
	b.session += "/" + session.SessionID
}

func (b *browser) end() {
	if b.driver == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	// The program is a shell script, which chromedriver would end without the browser.
	b.call(ctx, "POST", b.session+"/goog/cdp/execute", object{"cmd": "Browser.close", "params": object{}}, nil)
	b.call(ctx, "DELETE", b.session, nil, nil)
	b.driver.Process.Kill()
	b.driver.Wait() // until the last process of Chromium, which writes to the same pipe, has ended too
}

// endBrowsers is for when no test runs any more.
func endBrowsers() {
	close(idle)
	for b := range idle {
		b.end()
	}
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
	err = json.NewDecoder(resp.Body).Decode(&answer)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("chromedriver: %.500s", answer.Value)
	}
	if err != nil || v == nil {
		return err
	}
	return json.Unmarshal(answer.Value, v)
}

// do makes a request below the session's URL.
func (b *browser) do(method, path string, body object, v any) {
	b.t.Helper()
	must(b.t, b.call(b.t.Context(), method, b.session+path, body, v))
}

// devtools sends the current window a command of
// https://chromedevtools.github.io/devtools-protocol/.
func (b *browser) devtools(command string, params object) {
	b.t.Helper()
	b.do("POST", "/goog/cdp/execute", object{"cmd": command, "params": params}, nil)
}

// open opens a URL, or a path of the server, and returns when the page has loaded.
func (b *browser) open(at string) {
	b.t.Helper()
	if strings.HasPrefix(at, "/") {
		at = b.base + at
	}
	b.do("POST", "/url", object{"url": at}, nil)
}

// script returns the value of an expression, awaited.
func (b *browser) script(expression string) string {
	b.t.Helper()
	value, err := b.try(expression)
	must(b.t, err)
	return value
}

// try is script for a window that may be between two pages.
func (b *browser) try(expression string) (value string, err error) {
	body := object{"script": "return (async () => String(await (" + expression + ")))()", "args": []string{}}
	err = b.call(b.t.Context(), "POST", b.session+"/execute/sync", body, &value)
	return value, err
}

// is complains unless the value of an expression is what is wanted, and wait
// waits until it is.
func (b *browser) is(expression, want string) {
	b.t.Helper()
	equal(b.t, expression, b.script(expression), want)
}

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

// click waits until an element can be clicked: it may be about to be shown.
func (b *browser) click(selector string) {
	b.t.Helper()
	b.until("a click on "+selector, func() bool {
		var element map[string]string // one entry; its key is a constant of WebDriver's
		find := object{"using": "css selector", "value": selector}
		err := b.call(b.t.Context(), "POST", b.session+"/element", find, &element)
		for _, id := range element {
			err = b.call(b.t.Context(), "POST", b.session+"/element/"+id+"/click", object{}, nil)
		}
		return err == nil
	})
}

// forget logs the browser out.
func (b *browser) forget() { b.devtools("Network.clearBrowserCookies", object{}) }

// These stand for keys: https://www.w3.org/TR/webdriver2/#keyboard-actions
const tabKey, enterKey = "\ue004", "\ue007"

func (b *browser) press(keys ...string) {
	var strokes []object
	for _, key := range keys {
		strokes = append(strokes, object{"type": "keyDown", "value": key}, object{"type": "keyUp", "value": key})
	}
	b.do("POST", "/actions", object{"actions": []object{{"type": "key", "id": "keyboard", "actions": strokes}}}, nil)
}

// tabStops returns the texts of what the Tab key reaches, in order.
func (b *browser) tabStops() string {
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

// window opens one that is not hidden with the others, and returns its handle;
// current returns that of the current one, and turn makes another the current one.
func (b *browser) window() string {
	var made struct{ Handle string }
	b.do("POST", "/window/new", object{"type": "window"}, &made)
	return made.Handle
}

func (b *browser) current() (handle string) {
	b.do("GET", "/window", nil, &handle)
	return handle
}

func (b *browser) turn(handle string) { b.do("POST", "/window", object{"handle": handle}, nil) }

// phone clicks the link to the demo's phone, and turns to that.
func (b *browser) phone() {
	b.t.Helper()
	var before, after []string
	b.do("GET", "/window/handles", nil, &before)
	b.click(".wxscan-demo")
	b.until("a new tab", func() bool {
		b.do("GET", "/window/handles", nil, &after)
		return len(after) > len(before)
	})
	b.turn(after[slices.IndexFunc(after, func(handle string) bool { return !slices.Contains(before, handle) })])
	b.speak("en-US")
	b.wait("document.querySelector('[name=openid]')?.checkVisibility()", "true")
}

// speak sets the language of the current window, and what the browser's name ends in.
func (b *browser) speak(language string, agent ...string) {
	name := "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36"
	b.devtools("Emulation.setUserAgentOverride",
		object{"acceptLanguage": language, "userAgent": strings.Join(append([]string{name}, agent...), " ")})
}

// hide puts the current window where nobody sees its pages, and unhide back.
func (b *browser) hide() {
	b.t.Helper()
	b.do("POST", "/window/minimize", object{}, nil)
	b.wait("document.hidden", "true")
}

func (b *browser) unhide() { b.do("POST", "/window/rect", object{"width": 900, "height": 760}, nil) }

func (b *browser) resize(width, height int) {
	b.devtools("Emulation.setDeviceMetricsOverride",
		object{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false})
}

// fits complains if the page is wider than a window of each of the widths, 900, 375 or 320.
func (b *browser) fits(name string, widths []int, each func(width int)) {
	b.t.Helper()
	for _, width := range widths {
		b.resize(width, map[int]int{900: 760, 375: 667, 320: 568}[width])
		b.is("(({ scrollWidth, clientWidth }) => innerWidth + scrollWidth - clientWidth)(document.documentElement)",
			strconv.Itoa(width))
		each(width)
		b.screenshot(name + "-" + strconv.Itoa(width))
	}
	b.resize(900, 760)
}

// offline cuts the network off, or restores it. A request under way lives on.
func (b *browser) offline(off bool) {
	b.devtools("Network.enable", object{})
	b.devtools("Network.emulateNetworkConditions",
		object{"offline": off, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1})
}

// quiet complains of the errors and warnings on the consoles of all windows since
// the last call. What the Content-Security-Policy forbids is among them.
func (b *browser) quiet(at string) {
	b.t.Helper()
	var entries []struct{ Level, Message string }
	b.do("POST", "/se/log", object{"type": "browser"}, &entries)
	for _, entry := range entries {
		if entry.Level == "SEVERE" || entry.Level == "WARNING" {
			b.t.Errorf("%s: the console says %s", at, entry.Message)
		}
	}
}

// screenshot saves a picture of the page in the folder WXSCAN_SCREENSHOTS, if
// that is set.
func (b *browser) screenshot(name string) {
	folder := os.Getenv("WXSCAN_SCREENSHOTS")
	if folder == "" {
		return
	}
	var encoded string
	b.do("GET", "/screenshot", nil, &encoded)
	picture, err := base64.StdEncoding.DecodeString(encoded)
	must(b.t, err)
	must(b.t, os.WriteFile(filepath.Join(folder, name+".png"), picture, 0o644))
}

// textOf is an expression: the text that one sees of an element, "" if there is none.
func textOf(selector string) string {
	return fmt.Sprintf("(document.querySelector(%q)?.innerText ?? '')", selector)
}

// asked is an expression: how often the page has asked for paths that hold a text.
func asked(text string) string {
	return "performance.getEntriesByType('resource').filter((r) => r.name.includes('" + text + "')).length"
}

// Expressions for what is on the login page.
const (
	pageCode   = "(document.querySelector('.wxscan-code:not(.old) img')?.naturalWidth > 0)" // to be scanned
	pageTicket = "new URL(document.querySelector('.wxscan-code img').src).searchParams.get('ticket')"
	pageStatus = "document.querySelector('[role=status] .wxscan-status').innerText"
	pageHint   = "document.querySelector('[role=status] .wxscan-hint').innerText"
	pageOpenID = "document.querySelector('.wxscan-openid').innerText"
	pathname   = "location.pathname"
	// none while the phone may press nothing
	pageHeld = "getComputedStyle(document.querySelector('.wxscan-choice button')).pointerEvents"
)

// What the status says.
const (
	prompt   = "Scan with WeChat"
	hintAuth = "Then look at your phone"
	loggedIn = "You are logged in"
	saysSend = "Follow us, and send these digits"
	saysLost = "The connection is lost. Trying again…"
)

// login opens the login page, and waits for the code of the first flow, or with
// auth of the second.
func (b *browser) login(flow string) {
	b.t.Helper()
	b.open("/")
	b.wait(pageCode, "true")
	if flow == "auth" {
		b.click(".wxscan-link")
		b.wait(pageCode+" && "+asked("/getauthqr")+" > 0", "true")
	}
}

// scan scans the code on the page, from outside.
func (b *browser) scan(openID string) {
	b.t.Helper()
	scanned(b.t, b.base, b.script(pageTicket), openID)
}

func TestBrowserShowsWhoHasScanned(t *testing.T) {
	b := browse(t)
	for _, test := range []struct{ flow, button, phone, says string }{
		{"scan", "scan", "/demo/q/", "您已登录"},
		{"auth", "allow", "/static/html/loginsucceed.html", loggedIn},
	} {
		b.forget()
		b.login(test.flow)
		b.script("addEventListener('wxscan:login', () => { localStorage.shown = Date.now() })")
		page := b.current()
		b.phone()
		b.script("addEventListener('submit', () => { localStorage.pressed = Date.now() })")
		b.click("[value=" + test.button + "]")
		b.wait(pathname+".startsWith('"+test.phone+"') && document.body.innerText.includes('"+test.says+"')", "true")
		b.turn(page)
		b.wait(pageOpenID, "alice")
		b.is(pageStatus, loggedIn)
		took, err := strconv.Atoi(b.script("localStorage.shown - localStorage.pressed"))
		if err != nil || took >= 1000 {
			t.Errorf("%s: the page learns of the scan %d ms after it (error %v)", test.flow, took, err)
		}
		b.quiet(test.flow)
	}
}

func TestBrowserRenewsTheCodeWhileSomebodyLooks(t *testing.T) {
	b := browse(t, "-ttl", "2s")
	b.login("scan")
	first := b.script(pageTicket)
	b.wait(pageCode+" && "+pageTicket+" !== '"+first+"'", "true")

	b.offline(true) // for longer than a code lives
	b.wait(pageStatus, saysLost)
	b.wait("document.querySelector('.wxscan-bad') !== null", "true")
	b.offline(false)
	b.wait(pageCode, "true")

	b.hide()
	// Nothing may happen in the time that this code and another would have lived.
	codes, now := b.script(asked("/getloginqr")), b.script("performance.now()")
	b.wait("performance.now() > "+now+" + 4000", "true")
	b.is(asked("/getloginqr"), codes)
	b.unhide()
	b.wait(pageCode+" && "+asked("/getloginqr")+" > "+codes, "true")
}

// TestBrowserPollsOnlyWhileItIsSeen has more login pages open than a browser
// opens connections to a host over HTTP/1.1, of which one is to be seen.
func TestBrowserPollsOnlyWhileItIsSeen(t *testing.T) {
	b := browse(t)
	b.login("scan")
	first := b.current()
	for i := range 6 {
		b.hide()
		b.turn(b.window())
		begun := time.Now()
		b.login("scan")
		if took := time.Since(begun); took > 5*time.Second {
			t.Errorf("with %d pages hidden, one more takes %v", i+1, took)
		}
	}
	b.turn(first)
	b.scan("alice")
	polls := b.script(asked("/checklogin"))
	b.script("new Promise((resolve) => setTimeout(resolve, 1500))")
	b.is(asked("/checklogin")+" + "+textOf(".wxscan-openid"), polls) // it has asked nothing, and shows nobody
	begun := time.Now()
	b.unhide()
	b.wait(pageOpenID, "alice")
	if took := time.Since(begun); took > 2*time.Second {
		t.Errorf("seen again, the page takes %v to learn of the scan", took)
	}
	b.quiet("seven pages")
}

func TestBrowserRecoversALostConnectionAndLeavesNoListenersBehind(t *testing.T) {
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
	b.open("/")
	b.wait(pageStatus, prompt)
	b.wait("window.listeners.abort", "2") // of the poll that is parked
	parked := b.script("JSON.stringify(listeners)")
	b.offline(true)
	b.script("stop()") // the poll under way
	b.wait(pageStatus, saysLost)
	b.wait(asked("/checklogin")+" > 2", "true")
	b.offline(false)
	b.wait(pageStatus, prompt)
	b.wait("JSON.stringify(listeners)", parked)
	b.scan("bob")
	b.wait(pageOpenID, "bob")
}

// Whoever follows the account is told what to do, and whoever does it is logged in.
func TestBrowserLogsInWhoeverSendsTheDigits(t *testing.T) {
	b := browse(t, "-flows", "code")
	b.allowClipboard()
	b.open("/")
	b.wait(pageStatus, saysSend)
	b.wait(textOf(".wxscan-digits p")+".length", "6")
	b.wait(pageCode, "true") // the account's
	b.screenshot("code")
	b.click(".wxscan-main")
	b.wait(pageStatus+" + "+pageHint, "Copied"+saysSend)
	digits := b.script("navigator.clipboard.readText()")
	b.is(textOf(".wxscan-digits p"), digits)
	page := b.current()
	b.phone()
	const canSend = "document.readyState === 'complete' && " +
		"document.querySelector('.code[value=subscribe]').checkVisibility()"
	b.wait(canSend, "true")
	b.click(".code[value=subscribe]")
	b.wait(textOf(".bubble")+".includes('send the six digits')", "true")
	b.wait(canSend, "true")
	b.script("document.querySelector('[name=content]').value = '" + digits + "'")
	b.click(".wxscan-main.code")
	b.wait(textOf(".bubble")+".includes('您已登录')", "true")
	b.screenshot("phone-code")
	b.turn(page)
	b.wait(pageOpenID, "alice")
	b.quiet("digits")
}

func TestBrowserGoesOnWithTheNextWayWhereOneFails(t *testing.T) {
	b := browse(t, "-flows", "scan,code,auth")
	b.devtools("Page.addScriptToEvaluateOnNewDocument", object{"source": `
		const real = fetch;
		window.fetch = (url, ...rest) => url.endsWith("/wechat/getloginqr")
			? Promise.resolve(new Response('{"error":"wechat_refused"}', { status: 502 })) : real(url, ...rest);`})
	b.devtools("Network.enable", object{})
	b.devtools("Network.setBlockedURLs", object{"urls": []string{"*/qr/code*"}}) // the digits are enough
	b.open("/")
	b.wait(pageStatus, saysSend)
	b.is(pageHint, "The other way is down just now")
	b.wait("document.querySelector('.wxscan-digits img')", "null")
	b.is(textOf(".wxscan-digits p")+".length", "6")
}

func TestBrowserKnowsWhoIsLoggedIn(t *testing.T) {
	b := browse(t)
	openID := strings.Repeat("oW", 14)
	b.login("scan")
	b.scan(openID)
	b.wait(pageOpenID, "oWoWoW…oWoW")
	b.open("/?return_to=/healthz")
	b.wait(pageStatus, loggedIn)
	b.allowClipboard()
	b.click(".wxscan-openid")
	b.wait(pageStatus, "Copied")
	b.is("navigator.clipboard.readText()", openID)
	b.click(".wxscan-main")
	b.wait(pathname, "/healthz")
	b.open("/")
	b.click(".wxscan-more .wxscan-button")
	b.wait(pageCode, "true")
	b.login("scan") // and it stays so
}

func (b *browser) allowClipboard() {
	b.devtools("Browser.grantPermissions",
		object{"permissions": []string{"clipboardReadWrite", "clipboardSanitizedWrite"}})
}

func TestBrowserOnAPhoneSavesOrCopiesWhatItCannotScan(t *testing.T) {
	b := browse(t)
	b.speak("en", "Mobile")
	b.resize(375, 667)
	b.open("/")
	b.wait(pageStatus, "Save the picture, and scan it in WeChat")
	b.allowClipboard()
	b.click(".wxscan-main")
	b.wait(pageStatus, "Copied")
	b.is("navigator.clipboard.readText().then((s) => s.split('?')[0])", b.base+"/demo/connect/oauth2/authorize")
	saved := b.script("document.querySelector('.wxscan-button[download]').href")
	b.is("document.querySelector('.wxscan-code img').src", saved)
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
	b.login("scan")
	const phone = "frames[0].document.querySelector"
	b.wait(phone+"('[value=scan]')?.checkVisibility() ?? false", "true")
	b.screenshot("screenshot") // of the READMEs
	b.script(phone + "('[value=scan]').click()")
	b.wait(textOf(".wxscan-number")+".length", "2")
	b.wait(phone+"('.bubble a')?.innerText ?? ''", "查看并确认")
	b.is(phone+"('.bubble').scrollWidth <= "+phone+"('.chat').clientWidth", "true")
	b.script(phone + "('.bubble a').click()")
	b.wait(phone+"('.wxscan-choice') !== null", "true")
	b.wait("frames[0].getComputedStyle("+phone+"('.wxscan-choice button')).pointerEvents", "auto")
	b.screenshot("demo-confirm")
	b.script(phone + "(`[value='${" + textOf(".wxscan-number") + "}']`).click()")
	b.wait(pageOpenID, "alice")
	b.wait("frames[0].location.pathname", "/static/html/loginsucceed.html")
	b.quiet("the demo")
}

func TestBrowserTellsAnErrorInPlainWordsAndTriesAgain(t *testing.T) {
	b := browse(t, "-max-tickets", "1", "-ttl", "2s")
	begun(t, b.base, "getauthqr")
	b.open("/")
	b.wait(pageStatus, "Too many people just now. Try again in a moment.")
	b.screenshot("error")
	b.until("a code", func() bool { // which there is once the ticket has been swept away
		b.script("document.querySelector('.wxscan-main')?.click()")
		return b.script(pageCode) == "true"
	})
	b.is(textOf(".wxscan-main"), "")
}

func TestBrowserSpeaksTheUsersLanguage(t *testing.T) {
	b := browse(t, "-site-name", "Acme")
	for _, test := range []struct{ language, lang, heading, prompt, succeeded string }{
		{"zh-CN", "zh-CN", "登录 Acme", "请用微信扫一扫", "登录成功"},
		{"zh-TW", "zh-TW", "登入 Acme", "請用微信掃一掃", "登入成功"},
		{"zh-Hant-HK", "zh-TW", "登入 Acme", "請用微信掃一掃", "登入成功"},
		{"fr", "en", "Log in to Acme", prompt, loggedIn},
	} {
		b.speak(test.language)
		b.open("/")
		b.wait(pageStatus, test.prompt)
		b.is("document.documentElement.lang + ' ' + "+textOf("h1"), test.lang+" "+test.heading)
		b.is("document.title", test.heading)
		b.open("/static/html/loginsucceed.html")
		b.is("document.documentElement.lang + ' ' + "+textOf("h1"), test.lang+" "+test.succeeded)
	}
	b.click(".wxscan-languages [lang=zh-TW]")
	b.wait(textOf("h1"), "登入成功")
	b.open("/") // which remembers
	b.wait(textOf("h1"), "登入 Acme")
}

// TestBrowserFitsEveryPage looks at every page in every language, wide and narrow, and
// once light and dark. The login card has one size, whatever it shows.
func TestBrowserFitsEveryPage(t *testing.T) {
	b := browse(t, "-scope", "snsapi_userinfo")
	block := func(urls ...string) {
		b.devtools("Network.enable", object{})
		b.devtools("Network.setBlockedURLs", object{"urls": append([]string{}, urls...)})
	}
	open := func(path string) func() { return func() { b.open(path) } }
	phone := func() { b.open(b.script("document.querySelector('.wxscan-demo').href")) }
	for language, widths := range map[string][]int{"en": {900, 320}, "zh-CN": {900, 375, 320}, "zh-TW": {900, 320}} {
		heights := make(map[int]string) // of the card, by the page's width
		for _, page := range []struct {
			name string
			open func()
			want string // is there once the page is whole
		}{
			{"login", open("/"), "img"},
			{"phone-scan", phone, "[name=openid]"},
			{"auth", func() { b.login("auth") }, "img"},
			{"phone-auth", phone, "[name=openid]"},
			{"error", func() { block("*/wechat/get*"); b.open("/") }, ".wxscan-bad"},
			{"result", func() { block(); b.login("scan"); b.scan(strings.Repeat("oW", 32)) }, ".wxscan-openid"},
			{"session", open("/?return_to=/healthz"), ".wxscan-main"},
			{"profile", func() { b.forget(); b.login("auth"); b.scan("alice") }, ".wxscan-avatar"},
			{"loginsucceed", open("/static/html/loginsucceed.html"), "h1"},
			{"loginfailed", open("/static/html/loginfailed.html?reason=snapshot"), "h1"},
		} {
			b.speak(language)
			page.open()
			b.wait("(({ naturalWidth }) => naturalWidth !== 0)(document.querySelector('"+page.want+"'))", "true")
			b.fits(page.name+"-"+language, widths, func(width int) {
				card := b.script("document.querySelector('main:has([data-wxscan])')?.offsetHeight ?? ''")
				if heights[width] == "" {
					heights[width] = card
				}
				if card != "" && heights[width] != card {
					t.Errorf("%s, %s: the card is %s pixels high, not %s", page.name, language, card, heights[width])
				}
			})
			if language == "zh-CN" {
				b.isLightOrDark(page.name)
			}
		}
		b.forget()
	}
}

// isLightOrDark complains unless the page is as the user's preference says. A code is
// always on white.
func (b *browser) isLightOrDark(page string) {
	for _, scheme := range []string{"dark", "light"} {
		features := []object{{"name": "prefers-color-scheme", "value": scheme}}
		b.devtools("Emulation.setEmulatedMedia", object{"features": features})
		if !strings.HasPrefix(page, "phone") {
			b.wait("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).every((c) => c < 64)",
				strconv.FormatBool(scheme == "dark"))
		}
		if page == "login" {
			b.is("getComputedStyle(document.querySelector('.wxscan-code')).backgroundColor", "rgb(255, 255, 255)")
		}
		b.screenshot(page + "-" + scheme)
	}
}

func TestBrowserNeedsNeitherMouseNorEyes(t *testing.T) {
	b := browse(t)
	b.resize(800, 760)
	b.login("scan")
	b.is("document.querySelector('.wxscan-time').role", "timer")
	b.is("document.querySelector('.wxscan-code img').alt", "Login QR code, to be scanned with WeChat")
	b.is(textOf(".wxscan-languages [aria-pressed=true]"), "English")
	if got, want := b.tabStops(), "Another way, Simulated phone, 简体, 繁體, English"; got != want {
		t.Errorf("Tab reaches %q, want %q", got, want)
	}
	b.script("document.activeElement.blur()")
	b.press(tabKey, enterKey)
	b.wait(pageHint, hintAuth)
	b.wait("document.activeElement.innerText", "Another way") // the focus is not lost with the button
}

// TestBrowserInsideWeChatNeedsNoScan goes the way of who opens the login page
// on the phone, and has no second screen to scan, nor to read a number from.
func TestBrowserInsideWeChatNeedsNoScan(t *testing.T) {
	b := browse(t, "-confirm")
	b.speak("en", "MicroMessenger/8.0.50")
	b.open("/")
	b.wait(pathname, "/demo/connect/oauth2/authorize")
	b.click("[value=decline]")
	b.wait(pathname+" + location.search", "/static/html/loginfailed.html?reason=denied")

	b.open("/") // which must not send whoever declined straight back
	b.wait(textOf(".wxscan-main"), "Try again")
	b.click(".wxscan-main")
	b.wait(pathname, "/demo/connect/oauth2/authorize")
	b.click("[value=allow]")
	b.wait(textOf(".wxscan-own b")+".length", "2")
	number := b.script(textOf(".wxscan-own b"))
	b.wait(pageHeld, "auto")
	b.click("[value='" + number + "']")
	b.wait(pathname, "/")
	b.wait(pageOpenID, "alice")
	b.is("sessionStorage.getItem('wxscan')", "null")
}

func TestBrowserShowsOneReasonForAFailedLogin(t *testing.T) {
	b := browse(t)
	for reason := range strings.FieldsSeq("denied expired used snapshot declined number unavailable made-up") {
		b.open("/static/html/loginfailed.html?reason=" + reason)
		b.is("[...document.querySelectorAll('[data-reason]')].filter((p) => p.checkVisibility())"+
			".map((p) => p.dataset.reason).join()", strings.Replace(reason, "made-up", "unavailable", 1))
	}
}

func TestBrowserIsToldThatThePhoneDeclined(t *testing.T) {
	addr := freeAddress(t)
	// Not on loopback, where browsers trust plain http as if it were https.
	b := browse(t, "-confirm", "-addr", addr, "-url", strings.Replace("http://"+addr, "127.0.0.1", "wx.test", 1))
	b.login("auth")
	page := b.current()
	b.phone()
	b.click("[value=allow]")
	b.wait(pathname, "/wechat/confirm")
	b.fits("confirm", []int{900, 320}, func(int) {})
	phone := b.current()
	b.turn(page)
	b.wait(textOf(".wxscan-number")+".length", "2")
	b.is(pageStatus, "Scanned. Choose this number on your phone")
	b.screenshot("scanned")
	b.turn(phone)
	b.wait(pageHeld, "auto")
	b.click("[value=no]")
	b.wait(pathname+" + location.search", "/static/html/loginfailed.html?reason=declined")
	b.turn(page)
	b.wait(pageStatus, "Declined on the phone")
	b.quiet("declined")
}

// TestBrowserDecidesNothingByFastTaps has a page that says "tap fast", where the
// phone's buttons will be. Its fourth tap moves to where the authorize page leads,
// which asks nothing for snsapi_base, with the ticket of whoever made that page.
func TestBrowserDecidesNothingByFastTaps(t *testing.T) {
	bait := newLocalServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		io.WriteString(w, `<!doctype html><meta name="viewport" content="width=device-width">
			<link rel="icon" href="data:,"><script>let taps = 0</script>
			<button style="position: fixed; inset: 0; width: 100%; height: 100%"
			onclick="if (++taps === 4) location = decodeURIComponent(location.search.slice(1))">Tap fast!</button>`)
	}))
	b := browse(t, "-confirm")
	b.resize(375, 667)
	b.devtools("Emulation.setTouchEmulationEnabled", object{"enabled": true})
	b.open(allowed(t, begun(t, b.base, "getauthqr").URL, "alice"))
	b.wait(pathname, "/wechat/confirm")
	at := b.script("(({x, y, width, height}) => (x + width / 2) + ' ' + (y + height / 2))" +
		"(document.querySelector('.wxscan-choice button').getBoundingClientRect())")
	var x, y float64
	_, err := fmt.Sscan(at, &x, &y)
	must(t, err)
	tap := func() {
		b.devtools("Input.dispatchTouchEvent", object{"type": "touchStart", "touchPoints": []object{{"x": x, "y": y}}})
		b.devtools("Input.dispatchTouchEvent", object{"type": "touchEnd", "touchPoints": []object{}})
	}
	for try, longest := 0, holdBack; longest > holdBack/2; try++ { // longest is the time between two taps
		if try == 3 {
			t.Skipf("a tap takes %v: this machine is too busy to tap fast", longest)
		}
		ticket := begun(t, b.base, "getauthqr")
		b.open(bait + "?" + url.QueryEscape(allowed(t, ticket.URL, "alice")))
		tick, last := time.NewTicker(150*time.Millisecond), time.Now()
		longest = 0
		for range 25 {
			<-tick.C
			tap()
			longest, last = max(longest, time.Since(last)), time.Now()
		}
		tick.Stop()
		if longest > holdBack/2 {
			continue
		}
		b.is(pathname, "/wechat/confirm")
		if got := polled(t, b.base, ticket.Ticket, ""); got.Status != statusScanned {
			t.Errorf("the taps make the login %q", got.Status)
		}
		b.wait(pageHeld, "auto")
		tap()
		b.wait(pathname+".startsWith('/static/html/login')", "true")
	}
}

func TestBrowserGoesBackToWhereItCameFrom(t *testing.T) {
	b := browse(t)
	for query, want := range map[string]string{
		"/报告":                             "/%E6%8A%A5%E5%91%8A",
		url.QueryEscape("/healthz?q=a b"): "/healthz?q=a%20b",
		"/x?url=https%3A%2F%2Fa.example":  "/x?url=https%3A%2F%2Fa.example",
	} {
		b.forget()
		b.open("/?return_to=" + query)
		b.wait(pageCode, "true")
		b.scan("alice")
		b.wait(pathname+" + location.search", want)
	}
	b.open("/")
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
	if len(paths) == 0 {
		t.Error("nothing is taken")
	}
	b.is(string(encoded)+".filter((to) => new URL(to, location).origin !== location.origin).join(' ')", "")
}

func TestBrowserShowsTheBoxInAnotherSitesPage(t *testing.T) {
	var wxscan string
	site := newLocalServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprintf(w, `<!doctype html><link rel="icon" href="data:,"><div data-wxscan="auth"
			data-return-to="/\127.0.0.1:1/"></div><script src="%s/static/wxscan.js" defer></script>`, wxscan)
	}))
	b := browse(t, "-allowed-origins", site)
	wxscan = b.base
	b.open(site)
	b.wait(pageCode, "true")
	b.wait("getComputedStyle(document.querySelector('.wxscan')).display", "flex")
	b.script("addEventListener('wxscan:login', (e) => { told = e.detail.token.split('.').length + e.detail.openid })")
	b.scan("alice")
	b.wait(pageOpenID, "alice")
	b.wait("told", "3alice") // and it stays, for return_to is another site
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
	// sessions has a page load the poll of a login of mallory's for each script, which
	// calls it poll. It returns the scripts whose answers had a session.
	sessions := func(page string, scripts ...string) (with []string) {
		t.Helper()
		b.open(page)
		tickets := make([]string, len(scripts))
		for i, script := range scripts {
			tickets[i] = begun(t, b.base, "getauthqr").Ticket
			scanned(t, b.base, tickets[i], "mallory")
			b.script(fmt.Sprintf(`(() => {
				const poll = %q;
				const add = (tag, props) => document.body.append(Object.assign(document.createElement(tag), props));
				%s
			})()`, public+"/wechat/checklogin?ticket="+tickets[i], script))
		}
		for i, script := range scripts {
			b.until(script, func() bool {
				session, asked := polls.Load(tickets[i])
				if asked && session.(bool) {
					with = append(with, script)
				}
				return asked
			})
		}
		return with
	}
	with := sessions(evil,
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
		"frames[0].location = poll",
		"fetch(poll, { mode: 'no-cors', credentials: 'include' })",
		"fetch(poll, { credentials: 'include' }).catch(() => {})",
		"new EventSource(poll, { withCredentials: true })",
		"new Worker(URL.createObjectURL(new Blob([`importScripts('${poll}')`])))",
	)
	for _, leaves := range []string{
		"const [action, t] = poll.split('?ticket='); add('form', { action, " +
			"innerHTML: `<input name=ticket value=${t}>` }); document.forms[0].submit()",
		"location = poll",
		"add('meta', { httpEquiv: 'refresh', content: `0; url=${poll}` })",
	} {
		with = append(with, sessions(evil, leaves)...)
	}
	if len(with) > 0 {
		t.Errorf("answers with a session: %q", with)
	}
	const session = "fetch('/wechat/session').then((r) => r.json()).then((s) => s.openid ?? s.error)"
	b.open(public)
	b.is(session, "no_session")
	const fetch = "fetch(poll, { credentials: 'include' })"
	if got := sessions(allowed, "add('img', { src: poll })", fetch); !slices.Equal(got, []string{fetch}) {
		t.Errorf("of an allowed site, with a session: %q", got)
	}
	b.open(public)
	b.wait(session, "mallory")
	b.click(".wxscan-more .wxscan-button")
	b.wait(session, "no_session")
	b.wait(pageCode, "true")
	b.scan("alice")
	b.wait(pageOpenID, "alice")
	b.wait(session, "alice")
}

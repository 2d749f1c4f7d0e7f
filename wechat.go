package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"
)

const (
	callTimeout    = 4 * time.Second        // of one call
	requestTimeout = 9 * time.Second        // of all calls for one request: a browser hears within 10 s
	busyPause      = 300 * time.Millisecond // before asking again after errcode -1
	holdOff        = time.Second            // between token fetches that fail or do not help
	maxAnswer      = 1 << 20                // bytes, far above any answer of WeChat's
)

var (
	errUnreachable = errors.New("no usable answer from WeChat")
	errTimeout     = errors.New("no answer from WeChat in time")
	errRefused     = errors.New("refused by WeChat")
	errNoSuchCall  = errors.New("HTTP 404")
	errSnapshot    = errors.New("snapshot page: a virtual user, not a login")
)

// wechat is a client of WeChat's API for one Official Account.
type wechat struct {
	config config // the account and WeChat's addresses
	client *http.Client
	log    *slog.Logger
	called func(path, result string) // is told of each call: "ok", "refused", "timeout" or "unreachable"

	mu      sync.Mutex // guards the fields below; never held during a call
	token   *fetch     // the last fetch that brought a token, until that is refused
	latest  *fetch     // the fetch under way, or the last one
	dropped time.Time  // when a refused token was last dropped
}

// A fetch is one fetch of an access token, shared by all who wait for it.
type fetch struct {
	done    chan struct{} // closed by renew, once the fields below are set
	token   string
	err     error
	again   time.Time // when another fetch is due: a token's renewal, a failure's retry
	expires time.Time // of the token
	fetched time.Time
}

// newHTTPClient returns the client for WeChat. It follows no redirect: the
// secrets in our URLs and bodies are for WeChat alone.
func newHTTPClient() *http.Client {
	return &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// accessToken returns a token that is good, as far as we know. However many the
// callers, one fetch is under way at most; while the old token is good nobody
// waits for it. The error of a failed fetch stands for holdOff.
func (c *wechat) accessToken(ctx context.Context) (string, error) {
	c.mu.Lock()
	now := time.Now()
	if f := c.latest; f == nil || !f.again.IsZero() && !now.Before(f.again) {
		c.latest = &fetch{done: make(chan struct{})}
		go c.renew(c.latest) // ends within requestTimeout
	}
	good, f := c.token, c.latest
	c.mu.Unlock()
	if good != nil && now.Before(good.expires) {
		return good.token, nil
	}
	select {
	case <-f.done:
		return f.token, f.err
	case <-ctx.Done():
		return "", errTimeout
	}
}

// tokenAge returns how long ago the access token was fetched, 0 without one.
func (c *wechat) tokenAge() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.token == nil {
		return 0
	}
	return time.Since(c.token.fetched)
}

// renew runs a fetch to its end. It asks for the stable token (稳定版接口调用凭据),
// which many programs can share; where that is not offered, for the plain one,
// each of which ends the former.
func (c *wechat) renew(f *fetch) {
	ctx, cancel := context.WithTimeout(context.Background(), requestTimeout)
	defer cancel()
	got, err := c.call(ctx, "/cgi-bin/stable_token", nil, object{
		"grant_type": "client_credential", "appid": c.config.appID, "secret": c.config.appSecret, "force_refresh": false})
	if errors.Is(err, errNoSuchCall) || errors.Is(err, errRefused) && hint(err) == "" {
		got, err = c.call(ctx, "/cgi-bin/token", url.Values{
			"grant_type": {"client_credential"}, "appid": {c.config.appID}, "secret": {c.config.appSecret}}, nil)
	}
	if err == nil && got.AccessToken == "" {
		err = fmt.Errorf("%w: no access_token", errUnreachable)
	}
	// Lives are 300 to 7200 seconds. To believe in less could mean a fetch for
	// every call; a token that ends early is refused, and renewed then.
	life := time.Duration(min(max(got.ExpiresIn, 60), 7200)) * time.Second
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if err != nil {
		f.err, f.again = err, now.Add(holdOff)
		if c.token != nil && now.Before(c.token.expires) { // else who waits for f logs it
			c.log.Warn("renewing the access token", "err", err, "hint", hint(err))
		}
	} else {
		f.token, f.fetched, f.expires = got.AccessToken, now, now.Add(life)
		f.again = f.expires.Add(-min(300*time.Second, life/3))
		c.token = f
	}
	close(f.done)
}

// dropToken makes the next caller fetch a token, if the refused one is still
// the one we have. It is false if that was done within holdOff: then WeChat
// refuses new tokens too.
func (c *wechat) dropToken(refused string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.token == nil || c.token.token != refused:
		return true
	case time.Since(c.dropped) < holdOff:
		return false
	case c.latest == c.token:
		c.latest = nil
	}
	c.token, c.dropped = nil, time.Now()
	return true
}

// createQR makes a parametric QR code (生成带参数的二维码) that lives for ttl. It
// returns its ticket and what it says. A refused access token is renewed once.
// Like exchangeCode, it outlives the request that asks for it: a browser that
// leaves, or our shutdown, must not spoil a code.
func (c *wechat) createQR(ctx context.Context, scene string, ttl time.Duration) (ticket, says string, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()
	for try := 1; ; try++ {
		token, err := c.accessToken(ctx)
		if err != nil {
			return "", "", err
		}
		got, err := c.call(ctx, "/cgi-bin/qrcode/create", url.Values{"access_token": {token}}, object{
			"expire_seconds": int(ttl.Seconds()), "action_name": "QR_STR_SCENE",
			"action_info": object{"scene": object{"scene_str": scene}}})
		if try == 1 && hint(err) == hintToken && c.dropToken(token) {
			continue
		}
		if err == nil && (got.Ticket == "" || got.URL == "") {
			err = fmt.Errorf("%w: no ticket or no url", errUnreachable)
		}
		return got.Ticket, got.URL, err
	}
}

// qrImageURL returns where WeChat shows the QR code of a ticket (通过ticket换取二维码).
func (c *wechat) qrImageURL(ticket string) string {
	return c.config.mpBase + "/cgi-bin/showqrcode?ticket=" + url.QueryEscape(ticket)
}

// authorizeURL returns the page that asks the user for leave and then goes to
// redirectURI?code=…&state=… (网页授权). The phone shows a blank page if the
// parameters are in any other order. state is 1 to 128 letters and digits.
func (c *wechat) authorizeURL(redirectURI, state string) string {
	return c.config.openBase + "/connect/oauth2/authorize?appid=" + url.QueryEscape(c.config.appID) +
		"&redirect_uri=" + url.QueryEscape(redirectURI) +
		"&response_type=code&scope=" + c.config.scope + "&state=" + state + "#wechat_redirect"
}

// exchangeCode returns who is behind an OAuth code (通过code换取网页授权access_token),
// errSnapshot for a virtual user. A code is good for one exchange.
func (c *wechat) exchangeCode(ctx context.Context, code string) (login, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()
	got, err := c.call(ctx, "/sns/oauth2/access_token", url.Values{
		"appid": {c.config.appID}, "secret": {c.config.appSecret}, "code": {code}, "grant_type": {"authorization_code"}}, nil)
	switch {
	case err != nil:
		return login{}, err
	case got.IsSnapshotUser == 1:
		return login{}, errSnapshot
	case got.OpenID == "":
		return login{}, fmt.Errorf("%w: no openid", errUnreachable)
	}
	who := login{OpenID: got.OpenID, UnionID: got.UnionID}
	if c.config.scope == "snsapi_userinfo" { // 拉取用户信息
		got, err := c.call(ctx, "/sns/userinfo", url.Values{
			"access_token": {got.AccessToken}, "openid": {who.OpenID}, "lang": {"zh_CN"}}, nil)
		if err != nil { // who it is stands; the profile only adorns it
			c.log.Warn("login without a profile", "err", err, "hint", hint(err))
			return who, nil
		}
		who.Nickname, who.Avatar, who.UnionID = got.Nickname, got.HeadImgURL, cmp.Or(got.UnionID, who.UnionID)
	}
	return who, nil
}

type object = map[string]any

// An answer is what we read of WeChat's answers, to whichever call.
type answer struct {
	ErrCode        int     `json:"errcode"`
	ErrMsg         string  `json:"errmsg"`
	AccessToken    string  `json:"access_token"`
	ExpiresIn      float64 `json:"expires_in"` // seconds
	Ticket         string  `json:"ticket"`
	URL            string  `json:"url"`
	OpenID         string  `json:"openid"`
	UnionID        string  `json:"unionid"`
	IsSnapshotUser int     `json:"is_snapshotuser"`
	Nickname       string  `json:"nickname"`
	HeadImgURL     string  `json:"headimgurl"`
}

// call makes a call of WeChat's API: a POST of body as JSON, or a GET if body
// is nil. Its error is an *apiError, errTimeout or errUnreachable, and free of
// the URL. Where WeChat is busy, it asks up to three times, but never twice
// under /sns/, where codes are spent.
func (c *wechat) call(ctx context.Context, path string, query url.Values, body object) (answer, error) {
	for try := 1; ; try++ {
		got, err := c.roundTrip(ctx, path+"?"+query.Encode(), body)
		netErr, _ := errors.AsType[net.Error](err)
		result := "ok"
		switch {
		case netErr != nil && netErr.Timeout():
			result, err = "timeout", fmt.Errorf("%s: %w", path, errTimeout)
		case err != nil:
			result, err = "unreachable", fmt.Errorf("%s: %w: %w", path, errUnreachable, err)
		case got.ErrCode != 0:
			result, err = "refused", &apiError{path, got.ErrCode, got.ErrMsg}
		}
		c.called(path, result)
		if hint(err) != hintBusy || try == 3 || strings.HasPrefix(path, "/sns/") {
			return got, err
		}
		select {
		case <-time.After(busyPause):
		case <-ctx.Done():
			return got, err
		}
	}
}

// roundTrip returns an answer with status 200. The Content-Type is not looked
// at: WeChat sends JSON as text/plain.
func (c *wechat) roundTrip(ctx context.Context, target string, body object) (got answer, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	method, payload := http.MethodGet, []byte(nil)
	if body != nil {
		method = http.MethodPost
		payload, _ = json.Marshal(body) // ours: nothing in it can fail
	}
	var resp *http.Response
	req, err := http.NewRequestWithContext(ctx, method, c.config.apiBase+target, bytes.NewReader(payload))
	if err == nil {
		resp, err = c.client.Do(req)
	}
	if err != nil {
		return got, withoutURL(err)
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return got, errNoSuchCall
	default:
		return got, fmt.Errorf("HTTP %d", resp.StatusCode)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case len(data) > maxAnswer:
		err = errors.New("the answer is too large")
	case err == nil:
		err = json.Unmarshal(data, &got)
	}
	return got, err
}

// withoutURL strips an error of the URL that it holds, and so of secrets. Where
// net/http quotes an answer that it did not understand, that goes too.
func withoutURL(err error) error {
	if withURL, ok := errors.AsType[*url.Error](err); ok {
		err = withURL.Err
	}
	_, isNet := errors.AsType[net.Error](err)
	_, isCert := errors.AsType[*tls.CertificateVerificationError](err)
	if isNet || isCert || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, http.ErrSchemeMismatch) {
		return err
	}
	return errors.New("not an answer in HTTP")
}

// An apiError is a refusal by WeChat: an errcode in the body of a 200.
type apiError struct {
	path    string
	code    int    // errcode
	message string // errmsg, with the rid that WeChat's support asks for
}

func (e *apiError) Error() string {
	return fmt.Sprintf("%s: errcode %d: %.300s", e.path, e.code, e.message)
}

func (e *apiError) Is(target error) bool { return target == errRefused }

// The hints tell the operator what to do about a refusal, and us its kind.
const (
	hintBusy    = "WeChat is busy: try again later"
	hintAppID   = "set WECHAT_APPID to the appID on the account's page"
	hintSecret  = "set WECHAT_APPSECRET to the appsecret on the account's page; is it frozen there?"
	hintToken   = "WeChat refuses every access token: does another program fetch them for this appid with /cgi-bin/token?"
	hintIP      = "add this server's IP, which the errmsg names, to the account's IP whitelist (IP白名单); flow B works without"
	hintQuota   = "today's quota of this call is used up; it comes back at midnight in Beijing"
	hintPace    = "too many calls in a short time: pause"
	hintAccount = "this needs a verified service account (已认证的服务号) or a test account (测试号)"
	hintUsed    = "the code was used before: the user must start again"
	hintInvalid = "the code has expired or never was: the user must start again"
)

// hints has the errcodes (全局返回码) that are to be expected here.
var hints = map[int]string{
	-1:    hintBusy,
	40013: hintAppID, 40002: hintAppID, 41002: hintAppID,
	40125: hintSecret, 40243: hintSecret, 41004: hintSecret,
	40001: hintToken, 40014: hintToken, 42001: hintToken,
	40164: hintIP, 61004: hintIP, 89503: hintIP,
	45009: hintQuota, 45011: hintPace,
	48001: hintAccount, 50002: hintAccount,
	40163: hintUsed, 40029: hintInvalid, 42003: hintInvalid,
}

// hint returns what to do about an error; "" if that is not known.
func hint(err error) string {
	refused, ok := errors.AsType[*apiError](err)
	if !ok {
		return ""
	}
	if refused.code == 40001 && strings.HasSuffix(refused.path, "token") {
		return hintSecret // there is no access token yet that could be refused
	}
	return hints[refused.code]
}

// An event is a push of WeChat's (接收事件推送), as far as we use it.
type event struct {
	XMLName      xml.Name `xml:"xml"`
	ToUserName   string   // the account
	FromUserName string   // the openid
	MsgType      string
	Event        string
	EventKey     string
	Ticket       string
	Encrypt      string // in safe mode (消息加解密), the one field that counts
}

// scan tells whether the event is the scan of a parametric QR code, by a
// follower or by somebody who has followed the account with it.
func (e *event) scan() bool {
	followed := strings.EqualFold(e.Event, "subscribe") && strings.HasPrefix(e.EventKey, "qrscene_")
	return e.MsgType == "event" && e.FromUserName != "" && (followed || strings.EqualFold(e.Event, "SCAN"))
}

// scene returns the scene of the QR code that was scanned: with us, a ticket's
// key in hex.
func (e *event) scene() string { return strings.TrimPrefix(e.EventKey, "qrscene_") }

// decodeXML reads one document into v, whose XMLName says what its root must be.
func decodeXML(data []byte, v any) error {
	d := xml.NewDecoder(bytes.NewReader(data))
	if err := d.Decode(v); err != nil {
		return err
	}
	if len(bytes.TrimSpace(data[d.InputOffset():])) > 0 {
		return errors.New("something follows the root element")
	}
	return nil
}

// cdata is a string that WeChat wants in a CDATA section.
type cdata struct {
	Text string `xml:",cdata"`
}

// textReply returns the passive reply (被动回复用户消息) that shows text to the
// sender of an event.
func textReply(to *event, now time.Time, text string) ([]byte, error) {
	return xml.Marshal(struct {
		XMLName                  xml.Name `xml:"xml"`
		ToUserName, FromUserName cdata
		CreateTime               int64 // Unix seconds
		MsgType, Content         cdata
	}{
		ToUserName: cdata{to.FromUserName}, FromUserName: cdata{to.ToUserName},
		CreateTime: now.Unix(), MsgType: cdata{"text"}, Content: cdata{text},
	})
}

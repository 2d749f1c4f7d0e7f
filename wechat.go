package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
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
	appID, appSecret, scope   string
	apiBase, openBase, mpBase string // WeChat's addresses, without a slash at the end
	client                    *http.Client
	log                       *slog.Logger
	called                    func(path, result string) // after each call: ok, refused, timeout or unreachable
	replicas                  bool                      // other processes fetch access tokens for the account too
	fetching                  chan struct{}             // holds one element while an access token is fetched

	mu      sync.Mutex // guards the fields below
	token   accessToken
	dropped time.Time // when a refused token was last dropped
}

// An accessToken is the outcome of the last fetch.
type accessToken struct {
	value   string
	err     error     // why there is no value
	fetched time.Time // when the value was
	expires time.Time
	renew   time.Time // when another fetch is due
}

// newWeChat returns a client of the account that the settings name.
func newWeChat(c *config, log *slog.Logger) *wechat {
	return &wechat{appID: c.appID, appSecret: c.appSecret, scope: c.scope,
		apiBase: c.apiBase, openBase: c.openBase, mpBase: c.mpBase, replicas: c.redisURL != nil,
		client: newHTTPClient(), log: log, called: func(string, string) {}, fetching: make(chan struct{}, 1)}
}

// newHTTPClient returns a client that follows no redirect: the secrets in our URLs
// and bodies are for WeChat alone.
func newHTTPClient() *http.Client {
	return &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// accessToken returns a token that is valid as far as we know. Callers share one
// fetch, and its failure for holdOff. While one of them renews a token that is still
// valid, the others use it.
func (c *wechat) accessToken(ctx context.Context) (string, error) {
	select {
	case c.fetching <- struct{}{}:
	default:
		if t := c.lastToken(); time.Now().Before(t.expires) {
			return t.value, nil
		}
		select {
		case c.fetching <- struct{}{}:
		case <-ctx.Done():
			return "", errTimeout
		}
	}
	defer func() { <-c.fetching }()
	t := c.lastToken()
	if time.Now().Before(t.renew) {
		return t.value, t.err
	}
	fetched := c.fetchToken(ctx)
	if fetched.err != nil && time.Now().Before(t.expires) {
		c.log.Warn("renewing the access token", "err", fetched.err, hint(fetched.err))
		t.renew = fetched.renew
		fetched = t
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.token = fetched
	return fetched.value, fetched.err
}

func (c *wechat) lastToken() accessToken {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.token
}

// fetchToken asks for the stable token (稳定版接口调用凭据), which many programs can
// share. Where that is not offered, it asks for a plain one, unless there are
// replicas: each plain token ends the one before.
func (c *wechat) fetchToken(ctx context.Context) accessToken {
	got, err := c.call(ctx, "/cgi-bin/stable_token", nil, object{
		"grant_type": "client_credential", "appid": c.appID, "secret": c.appSecret, "force_refresh": false})
	notOffered := errors.Is(err, errNoSuchCall) || errors.Is(err, errRefused) && kindOf(err) == kindOther
	if notOffered && !c.replicas {
		got, err = c.call(ctx, "/cgi-bin/token", url.Values{
			"grant_type": {"client_credential"}, "appid": {c.appID}, "secret": {c.appSecret}}, nil)
	}
	if err == nil && got.AccessToken == "" {
		err = fmt.Errorf("%w: no access_token", errUnreachable)
	}
	now := time.Now()
	if err != nil {
		return accessToken{err: err, renew: now.Add(holdOff)}
	}
	// Lives are 300 to 7200 seconds. To believe less could mean a fetch for every
	// call; a token that ends earlier will be refused, and renewed then.
	life := time.Duration(min(max(got.ExpiresIn, 60), 7200)) * time.Second
	return accessToken{value: got.AccessToken, fetched: now, expires: now.Add(life),
		renew: now.Add(life - min(300*time.Second, life/3))}
}

// tokenAge returns how long ago the access token was fetched, 0 without one.
func (c *wechat) tokenAge() time.Duration {
	if t := c.lastToken(); t.value != "" {
		return time.Since(t.fetched)
	}
	return 0
}

// dropToken makes the next caller fetch a token, unless another has replaced the
// refused one. It is false if one was dropped within holdOff: WeChat refuses new ones too.
func (c *wechat) dropToken(refused string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.token.value == refused {
		if time.Since(c.dropped) < holdOff {
			return false
		}
		c.token, c.dropped = accessToken{}, time.Now()
	}
	return true
}

// createQR makes a parametric QR code (生成带参数的二维码) that lives for ttl, and returns
// its ticket and text. A refused access token is renewed once. Like exchangeCode, it
// outlives its request: a browser that leaves, or our shutdown, must not waste a code.
func (c *wechat) createQR(ctx context.Context, scene string, ttl time.Duration) (ticket, text string, err error) {
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
		if try == 1 && kindOf(err) == kindToken && c.dropToken(token) {
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
	return c.mpBase + "/cgi-bin/showqrcode?ticket=" + url.QueryEscape(ticket)
}

// authorizeURL returns the page that asks the user for permission and then goes to
// redirectURI?code=…&state=… (网页授权). In any other order of the parameters the
// phone shows a blank page. state is 1 to 128 letters and digits.
func (c *wechat) authorizeURL(redirectURI, state string) string {
	return c.openBase + "/connect/oauth2/authorize?appid=" + c.appID + "&redirect_uri=" + url.QueryEscape(redirectURI) +
		"&response_type=code&scope=" + c.scope + "&state=" + state + "#wechat_redirect"
}

// exchangeCode returns the person behind an OAuth code (通过code换取网页授权access_token);
// its error is errSnapshot for a virtual user. A code is good for one exchange.
func (c *wechat) exchangeCode(ctx context.Context, code string) (login, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()
	got, err := c.call(ctx, "/sns/oauth2/access_token", url.Values{
		"appid": {c.appID}, "secret": {c.appSecret}, "code": {code}, "grant_type": {"authorization_code"}}, nil)
	switch {
	case err != nil:
		return login{}, err
	case got.IsSnapshotUser == 1:
		return login{}, errSnapshot
	case got.OpenID == "":
		return login{}, fmt.Errorf("%w: no openid", errUnreachable)
	}
	who := login{OpenID: got.OpenID, UnionID: got.UnionID}
	if c.scope == "snsapi_userinfo" { // 拉取用户信息
		got, err := c.call(ctx, "/sns/userinfo", url.Values{
			"access_token": {got.AccessToken}, "openid": {who.OpenID}, "lang": {"zh_CN"}}, nil)
		if err != nil { // we know who it is all the same
			c.log.Warn("login without a profile", "err", err, hint(err))
			return who, nil
		}
		who.Nickname, who.Avatar, who.UnionID = got.Nickname, got.HeadImgURL, cmp.Or(got.UnionID, who.UnionID)
	}
	return who, nil
}

type object = map[string]any

// An answer has all that we read of WeChat's answers, whatever the call.
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

// call makes a call of WeChat's API: a POST of body as JSON, or a GET if body is nil.
// Its error is an *apiError, errTimeout or errUnreachable, and never holds the URL.
// It asks a busy WeChat three times, but once under /sns/: a code is good for one call.
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
		if kindOf(err) != kindBusy || try == 3 || strings.HasPrefix(path, "/sns/") {
			return got, err
		}
		time.Sleep(busyPause)
	}
}

// roundTrip returns an answer with status 200. It ignores the Content-Type: WeChat
// sends JSON as text/plain.
func (c *wechat) roundTrip(ctx context.Context, target string, body object) (got answer, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	method, payload := http.MethodGet, []byte(nil)
	if body != nil {
		method = http.MethodPost
		payload, _ = json.Marshal(body) // cannot fail: it is all strings, numbers and objects
	}
	req, err := http.NewRequestWithContext(ctx, method, c.apiBase+target, bytes.NewReader(payload))
	if err != nil {
		return got, withoutURL(err)
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return got, withoutURL(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNotFound {
		return got, errNoSuchCall
	}
	if resp.StatusCode != http.StatusOK {
		return got, fmt.Errorf("HTTP %d", resp.StatusCode)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer)) // what is cut off is no JSON
	if err == nil {
		err = json.Unmarshal(data, &got)
	}
	return got, err
}

// withoutURL removes the URL, and with it the secrets, from an error of net/http. An
// error that may quote an answer is replaced.
func withoutURL(err error) error {
	if withURL, ok := errors.AsType[*url.Error](err); ok {
		err = withURL.Err
	}
	_, isNet := errors.AsType[net.Error](err)
	_, isCert := errors.AsType[*tls.CertificateVerificationError](err)
	if isNet || isCert || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, http.ErrSchemeMismatch) {
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

// A kind is what a refusal means to us.
type kind string

const (
	kindOther   kind = "" // of any other error, too
	kindBusy    kind = "busy"
	kindAccount kind = "account" // of the appid, the appsecret, and what the account may do
	kindToken   kind = "token"
	kindIP      kind = "ip"
	kindQuota   kind = "quota"
	kindUsed    kind = "used"
	kindInvalid kind = "invalid"
)

// meaning returns the kind of an error, by its errcode (全局返回码), and what the
// operator can do about it, in English and Chinese; "" where we do not know.
func meaning(err error) (k kind, english, chinese string) {
	refused, ok := errors.AsType[*apiError](err)
	if !ok {
		return kindOther, "", ""
	}
	code := refused.code
	if code == 40001 && strings.HasSuffix(refused.path, "token") {
		code = 40125 // the call takes no access token: WeChat means the appsecret
	}
	for _, known := range []struct {
		kind             kind
		codes            []int
		english, chinese string
	}{
		{kindBusy, []int{-1}, "WeChat is busy: try again later", "微信系统繁忙，请稍后再试"},
		{kindAccount, []int{40013, 40002, 41002}, "set WECHAT_APPID to the appID on the account's page",
			"请把 WECHAT_APPID 设为公众号页面上的 appID"},
		{kindAccount, []int{40125, 40243, 41004},
			"set WECHAT_APPSECRET to the appsecret on the account's page; is it frozen there?",
			"请把 WECHAT_APPSECRET 设为公众号页面上的 appsecret；它是否已被冻结？"},
		{kindToken, []int{40001, 40014, 42001},
			"WeChat refuses every access token: does another program fetch them for this appid with /cgi-bin/token?",
			"微信拒绝所有 access token：是否有其他程序用此 appid 调用 /cgi-bin/token？"},
		{kindIP, []int{40164, 61004, 89503}, "add this server's IP, which the errmsg names, to the account's " +
			"IP whitelist (IP白名单); flow B works without",
			"请把本机的公网 IP 加入公众号的 IP 白名单；方式 B 不受影响"},
		{kindQuota, []int{45009}, "today's quota of this call is used up; it comes back at midnight in Beijing",
			"此接口今日的调用次数已用完，北京时间零点恢复"},
		{kindQuota, []int{45011}, "too many calls in a short time: pause", "调用过于频繁，请稍候"},
		{kindAccount, []int{48001, 50002},
			"this needs a verified service account (已认证的服务号) or a test account (测试号)",
			"需要已认证的服务号或测试号"},
		{kindUsed, []int{40163}, "the code was used before: the user must start again",
			"code 已被使用：请用户重新扫码"},
		{kindInvalid, []int{40029, 42003},
			"the code has expired or never was: the user must start again",
			"code 已过期或无效：请用户重新扫码"},
	} {
		if slices.Contains(known.codes, code) {
			return known.kind, known.english, known.chinese
		}
	}
	return kindOther, "", ""
}

func kindOf(err error) kind {
	k, _, _ := meaning(err)
	return k
}

// hint returns, for a log line, what the operator can do about an error, or else the
// empty attribute, which slog leaves out.
func hint(err error) slog.Attr {
	if _, english, _ := meaning(err); english != "" {
		return slog.String("hint", english)
	}
	return slog.Attr{}
}
